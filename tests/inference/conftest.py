"""A hub on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.inference.hub_server import Hub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process takes for the real one, with a token that may write and an empty cache."""
    from huggingface_hub import constants, hf_api

    with serving() as served:
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (
            ("ENDPOINT", served.endpoint),
            ("HUGGINGFACE_CO_URL_TEMPLATE", template),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_TOKEN_PATH", str(tmp_path / "token")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", served.endpoint)  # PEFT's
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        yield served
