"""Names that go into keys, files and labels."""

import pytest

from elastic_run.runtime.protocol.errors import UserError
from elastic_run.runtime.protocol.ids import check_name


@pytest.mark.parametrize("name", ["a", "job7", "A.b-c_9", "x" * 128])
def test_plain_names_pass(name: str) -> None:
    assert check_name(name, what="job id") == name


@pytest.mark.parametrize("name", ["", "-a", "../x", "a/b", "a b", "ü", "x" * 129, "a\n"])
def test_names_that_could_escape_a_key_or_path_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not usable"):
        check_name(name, what="job id")
