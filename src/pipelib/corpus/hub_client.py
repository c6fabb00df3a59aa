"""The client of the Hugging Face hub, and its environment variables: endpoint, proxy, certificates, token.

A retry cannot help against a wrong variable, so such an error ends the stage immediately and names the variable. No message
shows what may be a secret: a token, or a user name and password in an address.
"""

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pipelib.errors import UserError


def client() -> Any:
    """Import `huggingface_hub` and return it. It is imported late, because that is slow.

    Raises:
        UserError: it cannot read its environment variables.
    """
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ValueError as error:
        raise UserError(
            f"huggingface_hub cannot read its variables ({error}), so nothing can be downloaded; HF_ENDPOINT must be an "
            "address like https://huggingface.co, and HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT must be whole numbers of "
            "seconds."
        ) from None
    return huggingface_hub


def endpoint() -> str:
    """Return the address of the hub, or of the mirror in HF_ENDPOINT.

    Raises:
        UserError: HF_ENDPOINT is not a valid address.
    """
    value: str = client().constants.ENDPOINT
    if not _is_address(value):
        raise UserError(
            f"HF_ENDPOINT={shown(value)!r} is not the address of a hub, so nothing can be downloaded; write it like "
            "https://huggingface.co, with http:// or https:// in front, or unset it."
        )
    return value


def _is_address(value: str) -> bool:
    try:
        address = urlsplit(value)
        complete = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # an invalid port or bracket
        return False
    return bool(complete and not address.query and not address.fragment and value.isprintable() and " " not in value)


def shown(address: str) -> str:
    """Return an address without the parts that may be secret: user name, password, query."""
    scheme, separator, rest = address.rpartition("://")
    return scheme + separator + rest.partition("?")[0].partition("#")[0].rpartition("@")[2]


def session() -> Any:
    """Return the client's HTTP session, configured with the proxies and certificates of the environment.

    Raises:
        UserError: a proxy or a certificate file that the environment names cannot be used.
    """
    import httpx2

    # The client reads certificates and proxies when it makes the session, so their errors appear here.
    try:
        return client().get_session()
    except UserError:
        raise
    except OSError as error:  # an ssl.SSLError is one
        raise UserError(
            f"SSL_CERT_FILE={os.environ.get('SSL_CERT_FILE', '')} cannot be read as certificates "
            f"({error.strerror or error}), so no connection can be made; name a file of PEM certificates, or unset it."
        ) from None
    except ImportError:
        raise UserError(
            f"{_proxy_variables()}: a SOCKS proxy needs the package socksio, which is not installed, so nothing can be "
            "downloaded; run `pip install socksio`, or name an HTTP proxy (http://HOST:PORT)."
        ) from None
    except (ValueError, httpx2.InvalidURL):
        raise UserError(
            f"{_proxy_variables()}: the address of the proxy cannot be used, so nothing can be downloaded; write it like "
            "http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, special characters of the password as %XX, or unset it."
        ) from None


def _proxy_variables() -> str:
    return ", ".join(name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy"))


def headers() -> dict[str, str]:
    """Return the headers of every request, including the token.

    Raises:
        UserError: the token cannot be read or sent.
    """
    hub = client()
    try:
        found: dict[str, str] = hub.utils.build_hf_headers()
    except (IsADirectoryError, NotADirectoryError, PermissionError, UnicodeError) as error:
        raise UserError(
            f"the hub's token cannot be read from {hub.constants.HF_TOKEN_PATH} ({_short_reason(error)}), so nothing can be "
            "downloaded; check HF_TOKEN_PATH and HF_HOME, or set HF_TOKEN."
        ) from None
    new_token = "copy it again (tokens are on https://huggingface.co/settings/tokens; `hf auth login` stores one too)"
    variables = {
        "authorization": ("HF_TOKEN", new_token),
        "user-agent": ("HF_HUB_USER_AGENT_ORIGIN", "write it in ASCII without line breaks, or unset it"),
    }
    for name, (variable, remedy) in variables.items():
        value = found.get(name, "")
        # HTTP headers are ASCII. A pasted token may contain a line break or a non-breaking space.
        if not (value.isascii() and value.isprintable()):
            raise UserError(f"{variable} has a character that cannot be sent, so no request can be made; {remedy}.")
    return found


def timeout() -> float:
    """Return after how many seconds without a byte a request fails.

    Raises:
        UserError: HF_HUB_DOWNLOAD_TIMEOUT is not positive.
    """
    seconds: float = client().constants.HF_HUB_DOWNLOAD_TIMEOUT
    if seconds <= 0:
        raise UserError(
            f"HF_HUB_DOWNLOAD_TIMEOUT={seconds}: no request would get an answer; set a positive number of seconds."
        )
    return seconds


def _short_reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def connection_failure(error: BaseException) -> str:
    """Say why there is no connection, and to which host."""
    address = urlsplit(endpoint())
    proxy = getproxies().get(address.scheme) or getproxies().get("all")
    through_proxy = proxy and not proxy_bypass(address.hostname or "")
    host = f"the proxy {shown(str(proxy))}" if through_proxy else str(address.hostname)
    # The client wraps the system's error, so look through the chain of causes.
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror):
            return f"the name of {host} cannot be resolved"
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return f"no connection to {host}: TLS, {cause.reason.replace('_', ' ').lower()}"
    return f"no connection to {host}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def permanent_failure(error: BaseException) -> tuple[str, str] | None:
    """Return the reason and the remedy of a connection error that a retry cannot fix; None for any other error."""
    import httpx2

    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the certificate of {_host(error)} cannot be verified: {cause.verify_message}", _trust_remedy()
        if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
            return (
                f"{_host(error)} or the proxy does not speak TLS at this port",
                "check the port, or write http:// instead of https:// in HF_ENDPOINT or HTTPS_PROXY",
            )
    # 408 (timeout) and 429 (too many requests) are temporary; all other 4xx of a proxy are not.
    if isinstance(error, httpx2.ProxyError) and str(error)[:1] == "4" and str(error)[:3] not in ("408", "429"):
        return f"the proxy answers {error}", PROXY_REMEDY
    if isinstance(error, httpx2.LocalProtocolError):
        return "the request cannot be sent", "check HF_TOKEN and HF_HUB_USER_AGENT_ORIGIN"
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.TooManyRedirects):
        return "the request is redirected in a loop or to an unsupported address", "check HF_ENDPOINT and the proxy"
    return None


PROXY_REMEDY = (
    "set HTTPS_PROXY (HTTP_PROXY for an http:// endpoint) to http://USER:PASSWORD@HOST:PORT if it asks for a password; else ask "
    "for the proxy to allow the hub's hosts, or list hosts that need no proxy in NO_PROXY"
)


def _host(error: BaseException) -> str:
    """Return the host of the failed request. A file's bytes may come from another host than the endpoint."""
    with suppress(AttributeError, RuntimeError):  # raised if the error has no request
        return str(error.request.url.host)  # type: ignore[attr-defined]
    return str(urlsplit(endpoint()).hostname)


def _trust_remedy() -> str:
    """Return the remedy for a certificate that cannot be verified."""
    read = [f"{name}={os.environ[name]}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)][:1]
    ignored = [name for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if os.environ.get(name)]
    return (
        "set SSL_CERT_FILE to a file (PEM) with the certificate of the authority that signed it, your network's or your mirror's"
        + (f" (only {read[0]} is used now)" if read else "")
        + (f" (the hub's client does not read {' or '.join(ignored)})" if ignored else "")
    )
