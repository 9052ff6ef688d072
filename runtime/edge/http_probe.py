"""One small HTTP request to a server on this host or a near one, for health questions. No redirects, no TLS, bounded.

Not here: metrics and health endpoints of our own processes.
"""

import asyncio

from elastic_run.runtime.protocol.errors import PeerError

RESPONSE_BYTES_MAX = 65536
PROBE_TIMEOUT_S = 2.0


async def probe(host: str, port: int, path: str, *, body: bytes | None = None) -> bytes:
    """Return the body of the answer to a GET, or a POST when there is a body. Raises PeerError for anything but 200."""
    method, content = ("GET", b"") if body is None else ("POST", body)
    head = f"{method} {path} HTTP/1.0\r\nHost: {host}:{port}\r\nContent-Length: {len(content)}\r\n\r\n"
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(head.encode() + content)
                answer = await _read_all(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise PeerError(f"{host}:{port} does not answer: {str(error) or 'timed out'}") from None
    headers, _, answer_body = answer.partition(b"\r\n\r\n")
    status = headers.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise PeerError(f"{host}:{port} answers {headers.splitlines()[0]!r} to {path}" if headers else "closed")
    return answer_body


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    answer = b""
    while len(answer) < RESPONSE_BYTES_MAX and (part := await reader.read(RESPONSE_BYTES_MAX - len(answer))):
        answer += part
    return answer
