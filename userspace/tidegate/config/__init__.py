"""The configuration: one TOML file in, frozen objects or all of its errors out."""

from tidegate.config.errors import ConfigError, ConfigErrors
from tidegate.config.loader import load, parse
from tidegate.config.model import Config

__all__ = ["Config", "ConfigError", "ConfigErrors", "load", "parse"]
