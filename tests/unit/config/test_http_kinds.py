"""Values that mean something in HTTP: what an edit, a condition or a target may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.config import http_kinds as kinds
from tidegate.config import kinds as plain
from tidegate.config.errors import BadValueError
from tidegate.config.lines import Lines
from tidegate.config.schema import FAILED, Kind, Reading, Spot


def spot() -> Spot:
    return Spot(Reading("web.toml", Path("/"), Lines({})), ("key",))


def read(kind: Kind, value: object) -> object:
    return kind.read(value, spot())


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\r\nX: y", "a\0b", "a\x7fb", "a\x1bb", " a", "a\t"])
def test_header_values_are_one_line(bad: str) -> None:
    with pytest.raises(BadValueError):
        read(kinds.HeaderValue(), bad)


@pytest.mark.parametrize("good", ["", "a b", "a\tb", 'max-age=0; x="y"', "café"])
def test_header_values(good: str) -> None:
    assert read(kinds.HeaderValue(), good) == good


@pytest.mark.parametrize(
    "name",
    ["Connection", "content-length", "HOST", "Keep-Alive", "TE", "Transfer-Encoding", "Upgrade", "Via"],
)
def test_framing_is_not_to_be_edited(name: str) -> None:
    with pytest.raises(BadValueError, match="tidegate itself writes"):
        read(kinds.HeaderName(), name)
    here = spot()
    assert kinds.HeaderMap().read({name: "1"}, here) is FAILED
    assert [error.key_path for error in here.reading.errors] == [f"key.{name}"]


@pytest.mark.parametrize("bad", ["", "X A", "X:", "X\r", "ü", "X\0"])
def test_header_names_are_tokens(bad: str) -> None:
    with pytest.raises(BadValueError):
        read(kinds.HeaderName(), bad)


def test_header_names_do_not_differ_by_case() -> None:
    here = spot()
    assert kinds.HeaderMap().read({"X-A": "1", "x-a": "2"}, here) is FAILED
    assert "set twice" in here.reading.errors[0].message


@pytest.mark.parametrize(
    ("host", "means"),
    [
        ("WWW.Example.org", "www.example.org"),
        ("*.a.b", "*.a.b"),
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]", "[::1]"),
    ],
)
def test_hosts(host: str, means: str) -> None:
    assert read(kinds.HostPattern(), host) == means


@pytest.mark.parametrize(
    "bad", ["", "*", "a.*", "*.*.b", "a b", "a.b:80", "[::1]:80", "[x]", "http://a", "bücher.de"]
)
def test_no_hosts(bad: str) -> None:
    with pytest.raises(BadValueError) as caught:
        read(kinds.HostPattern(), bad)
    assert caught.value.write or caught.value.fix


@pytest.mark.parametrize(
    ("value", "good"),
    [("", True), ("app", True), ("app:80", True), ("[::1]:80", True), ("app:0", False), ("app:x:1", False)],
)
def test_rewritten_hosts(value: str, good: bool) -> None:
    if good:
        assert read(kinds.HostAndPort(), value) == value
    else:
        with pytest.raises(BadValueError):
            read(kinds.HostAndPort(), value)


@pytest.mark.parametrize("good", ["https", "https://a.b/x?y=1", "http://[::1]:80/", "/new"])
def test_targets(good: str) -> None:
    assert read(kinds.Target(), good) == good


@pytest.mark.parametrize(
    "bad", ["", "http", "ftp://a/", "//evil", "https:///x", "https://a:99999/", "/a\r\nX: y", "/a b"]
)
def test_no_targets(bad: str) -> None:
    with pytest.raises(BadValueError):
        read(kinds.Target(), bad)


@pytest.mark.parametrize("bad", ["api", "/a?b", "/a#b", "/ä", "/a b", "/a\n"])
def test_no_paths(bad: str) -> None:
    with pytest.raises(BadValueError):
        read(kinds.UrlPath(), bad)


@pytest.mark.parametrize("bad", ["get", "Post", "", "GET POST", "GET\r"])
def test_no_methods(bad: str) -> None:
    with pytest.raises(BadValueError):
        read(kinds.Method(), bad)


def test_methods_of_extensions_are_good() -> None:
    assert read(kinds.Method(), "PROPFIND") == "PROPFIND"


@pytest.mark.parametrize("bad", ["(", "[a", "(?P<x", "a" * 1001, "a{99999999999}"])
def test_no_patterns(bad: str) -> None:
    with pytest.raises(BadValueError):
        read(kinds.Pattern(), bad)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.pem"
    file.write_text("x")

    def refuse(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadValueError, match=r"cannot read .*Permission denied"):
        read(plain.File(), str(file))


def test_a_path_of_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadValueError, match="there is no directory"):
        read(plain.WritablePath(("stdout",)), str(tmp_path / "none" / "access.log"))
    assert read(plain.WritablePath(("stdout",)), "stdout") == "stdout"
    assert read(plain.WritablePath(), str(tmp_path / "access.log")) == str(tmp_path / "access.log")


@pytest.mark.parametrize("status", ["301", "302", "307", "308", "400", "499", "599"])
def test_answers_are_of_errors_and_redirects(status: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("page")
    assert read(kinds.Answers(), {status: str(tmp_path / "page.html")}) == (
        (int(status), tmp_path / "page.html"),
    )


@pytest.mark.parametrize("status", ["200", "204", "300", "303", "304", "600", "99", "4000", "abc", "40x"])
def test_other_statuses_have_no_answer_of_ours(status: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("page")
    here = spot()
    kinds.Answers().read({status: str(tmp_path / "page.html")}, here)
    assert "is not the status of an error or a redirect" in here.reading.errors[0].message
