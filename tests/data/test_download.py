"""Download against a server that breaks off, changes its mind, or has nothing."""

import http.server
import threading
from contextlib import contextmanager

import pytest

from r2ec_trl.data.sources.download import download
from r2ec_trl.errors import UserError

CONTENT = bytes(range(256)) * 40


@contextmanager
def server(breaks=0, ranges=True, content=CONTENT, status=200):
    """Serves `content`; the first `breaks` answers stop after 3,000 bytes; remembers the ranges asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            asked.append(wanted)
            if status != 200:
                self.send_error(status)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and ranges else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if wanted and ranges else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if wanted and ranges:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[start : start + 3000] if len(asked) <= breaks else content[start:])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/file.gz", asked
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_whole_file_with_progress(tmp_path):
    seen = []
    with server() as (url, asked):
        path = download(url, tmp_path / "a" / "file.gz", progress=lambda *told: seen.append(told))
        assert download(url, path) == path and len(asked) == 1  # not fetched again
    assert path.read_bytes() == CONTENT
    assert seen[-1] == ("file.gz", len(CONTENT), len(CONTENT))
    assert [file.name for file in path.parent.iterdir()] == ["file.gz"]


def test_goes_on_after_breaks(tmp_path):
    with server(breaks=3) as (url, asked):
        assert download(url, tmp_path / "file.gz").read_bytes() == CONTENT
    assert asked == [None, "bytes=3000-", "bytes=6000-", "bytes=9000-"]


def test_goes_on_in_the_next_run(tmp_path):
    (tmp_path / "file.gz.part").write_bytes(CONTENT[:5000])
    with server() as (url, asked):
        assert download(url, tmp_path / "file.gz").read_bytes() == CONTENT
    assert asked == ["bytes=5000-"]
    (tmp_path / "done.gz.part").write_bytes(CONTENT)
    with server() as (url, asked):
        assert download(url, tmp_path / "done.gz").read_bytes() == CONTENT
    assert asked == [f"bytes={len(CONTENT)}-"]


def test_starts_again_where_the_server_knows_no_ranges_or_the_file_has_changed(tmp_path):
    (tmp_path / "file.gz.part").write_bytes(b"old" * 1000)
    with server(ranges=False) as (url, _):
        assert download(url, tmp_path / "file.gz").read_bytes() == CONTENT
    (tmp_path / "other.gz.part").write_bytes(CONTENT + b"more than there is")
    with server() as (url, _):
        assert download(url, tmp_path / "other.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("status, sentence", [(404, "404 .* check category and URL"), (503, "503 .* run again")])
def test_gives_up_in_one_sentence(tmp_path, status, sentence):
    with server(status=status) as (url, asked):
        with pytest.raises(UserError, match=sentence):
            download(url, tmp_path / "file.gz", attempts=2)
    assert len(asked) == (1 if status == 404 else 2)
    assert not (tmp_path / "file.gz").exists()


def test_no_server(tmp_path):
    with server() as (url, _):
        pass
    with pytest.raises(UserError, match="cannot be fetched .*run again, it goes on where it stopped"):
        download(url, tmp_path / "file.gz", attempts=2, timeout=5)
