"""Downloads picture files from web addresses."""

from __future__ import annotations

from typing import Any

from blip2edge.errors import ImageError, shown_address
from blip2edge.version import __version__

WEB = ("http://", "https://")
TIMEOUT_S = 30.0  # without any byte from a web server
MAX_DOWNLOAD = 128 << 20  # bytes


def download(address: str) -> bytes:
    """Downloads the bytes of a web address; redirects to other protocols are not followed.

    Raises:
        ImageError: The address is not valid, the server does not answer or answers with an error, or the file is
            larger than `MAX_DOWNLOAD`.
    """
    import http.client
    import urllib.error
    import urllib.request

    class OnlyWeb(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request: Any, file: Any, code: int, text: str, headers: Any, target: str) -> Any:
            if not target.lower().startswith(WEB):
                raise urllib.error.URLError(f"the server redirects to {target}")
            return super().redirect_request(request, file, code, text, headers, target)

    try:
        request = urllib.request.Request(_encoded(address), headers={"User-Agent": f"blip2edge/{__version__}"})
        with urllib.request.build_opener(OnlyWeb).open(request, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(MAX_DOWNLOAD + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise _not_downloaded(address, f"the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _not_downloaded(address, error.reason) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _not_downloaded(address, error) from error
    if len(content) > MAX_DOWNLOAD:
        raise ImageError(
            f"{shown_address(address)}: expected at most {MAX_DOWNLOAD >> 20} MiB, got more", "use a smaller picture"
        )
    return content


def _encoded(address: str) -> str:
    """Encodes the non-ASCII characters and spaces of an address as browsers do.

    For example, the result is ``https://xn--bcher-kva.example/a%20b.png``.
    """
    from urllib.parse import quote, urlsplit, urlunsplit

    parts = urlsplit(address)
    if "@" in parts.netloc:
        raise ValueError("a user name in the address is not supported")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    safe = "%/:;=?@&+$,!~*'()[]"
    return urlunsplit((parts.scheme, host, quote(parts.path, safe), quote(parts.query, safe), ""))


def _not_downloaded(address: str, reason: object) -> ImageError:
    return ImageError(f"{shown_address(address)}: cannot be downloaded ({reason})", "check the address")
