"""The line that a user reads when a model is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ditc.errors import CheckpointError, InputError


def refusal_of(read: Callable[[], object], about: object = "", error: type[InputError] = CheckpointError) -> str:
    """The one line of a refusal, which has to name what it is `about`."""
    with pytest.raises(error) as caught:
        read()
    message = str(caught.value)
    assert message.isprintable()
    assert str(about) in message
    return message
