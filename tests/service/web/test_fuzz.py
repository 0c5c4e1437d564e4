"""The whole API fuzzed from its own OpenAPI document, through the real app and engine.

schemathesis reads the document, sends what it allows and what it forbids, and holds every answer
to it: status, media type, headers, body, each event of a stream. The seed is fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.engine import events
from schemathesis.engine.recorder import CheckNode

from service.access.keys import make_key
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app

KEY, LINE = make_key("fuzz")


@pytest.fixture(scope="module")
def app(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FastAPI]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(LINE)
    values = {
        "model": str(lcm_checkpoint),
        "engine": "onnxruntime",
        "cache_dir": cache_dir,
        "api_keys_file": keys,
        "max_images": 2,
        "max_steps": 4,
        "max_prompt_chars": 200,
    }
    app = build_app(Replica(load_settings(values)))
    with TestClient(app):
        yield app


# Beyond what a document says of each field: rules that join fields, or come from the model. Each
# of them stands word for word in test_bad_input.
JOINED = {
    "background", "crops_coords_top_left", "decoder", "guidance_scale", "image", "images", "loras",
    "mask", "num_inference_steps", "original_size", "output_compression", "partial_images",
    "prompt", "seed", "size", "strength", "target_size", "timesteps",
}  # fmt: skip


def test_every_answer_is_as_documented(app: FastAPI) -> None:
    config = SchemathesisConfig.from_dict(
        {
            "seed": 20261121,
            "continue-on-failure": True,  # else the first thing it wonders at ends an operation
            "headers": {"Authorization": f"Bearer {KEY}"},
            "generation": {"deterministic": True, "max-examples": 30, "no-shrink": True},
            "phases": {"stateful": {"enabled": False}},  # no answer names another resource
        }
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    problems, num_answers = [], Counter[tuple[str, int]]()
    for event in engine.from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            problems.append(str(event))
        if not isinstance(event, events.ScenarioFinished):
            continue
        for case_id, checks in event.recorder.checks.items():
            answer = event.recorder.find_response(case_id=case_id)
            assert answer is not None, "an exchange without an answer"
            num_answers[event.recorder.label, answer.status_code] += 1
            problems += [
                f"{event.recorder.label}: {check.name}: {check.failure_info.failure}: {answer.text}"
                for check in checks
                if check.failure_info is not None and not _is_expected(check, answer)
            ]
    assert problems == []
    for label in ("POST /v1/images/generations", "POST /v1/images/edits"):
        assert num_answers[label, 200] >= 5, num_answers  # what is right was drawn, not refused
        assert num_answers[label, 400] >= 50, num_answers


def _is_expected(check: CheckNode, answer: Response) -> bool:
    """Whether what schemathesis wonders at is as it should be."""
    assert check.failure_info is not None
    if check.name == "positive_data_acceptance" and answer.status_code == 400:
        error = answer.json()["error"]
        # JSON Schema calls 1.0 an integer, and this service does not.
        not_whole = error["message"].endswith(".0: input should be a valid integer")
        return not_whole or error["param"].partition(".")[0] in JOINED
    if check.name == "not_a_server_error":  # a deadline of its own that nothing could meet
        asked = "X-Request-Timeout" in answer.request.headers
        return asked and answer.json()["error"]["code"] == "deadline_exceeded"
    what = check.failure_info.failure.message
    return "Invalid component: in header - object with unexpected properties" in what
