"""Configuration: TOML to frozen typed objects, every error with file and line."""
