from pathlib import Path

import pytest

from elastic_run.runtime.edge.etcd_config import EtcdConfig
from elastic_run.runtime.protocol.errors import UserError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoints": ()}, "1 to 16 etcd endpoints"),
        ({"endpoints": ("a:1",) * 17}, "not 17"),
        ({"endpoints": ("host",)}, "host:port"),
        ({"endpoints": ("host:",)}, "host:port"),
        ({"endpoints": (":1",)}, "host:port"),
        ({"endpoints": ("host:0",)}, "host:port"),
        ({"endpoints": ("host:65536",)}, "host:port"),
        ({"endpoints": ("http://host:1",)}, "host:port"),
        ({"namespace": "job"}, "must begin with '/'"),
        ({"namespace": "/job/"}, "not end with it"),
        ({"cert_file": Path("c")}, "given together"),
        ({"key_file": Path("k")}, "given together"),
        ({"password": "p"}, "without a user"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"endpoints": ("a:1",), "namespace": "/job", **changes}
    with pytest.raises(UserError, match=message) as told:
        EtcdConfig(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(told.value)


def test_any_tls_file_means_tls_and_the_password_is_not_shown() -> None:
    plain = EtcdConfig(endpoints=("a:1", "[::1]:2"), namespace="/job", user="u", password="hidden")
    assert not plain.secure and "hidden" not in repr(plain)
    assert EtcdConfig(endpoints=("a:1",), namespace="/job", tls=True).secure
    assert EtcdConfig(endpoints=("a:1",), namespace="/job", ca_file=Path("ca")).secure
