"""The whole API fuzzed from its own OpenAPI document, through the real app and engine.

schemathesis reads the document, sends what it allows and what it forbids, and holds every answer
to it: status, media type, headers, body, each event of a stream. The seed is fixed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.engine import events
from schemathesis.engine.recorder import CheckNode
from schemathesis.schemas import BaseSchema

from service.access.keys import make_key
from service.ray_serve.environment import free_port
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.waiting import wait_for

KEY, LINE = make_key("fuzz")


@pytest.fixture(scope="module")
def settings(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(LINE)
    return {
        "cache_dir": cache_dir,
        "api_keys_file": keys,
        "max_images": 2,
        "max_steps": 4,
        "max_prompt_chars": 200,
        "video_files_dir": tmp_path_factory.mktemp("videos"),
        "drain_s": 0,
    }


@contextlib.contextmanager
def serving(**values: Any) -> Iterator[FastAPI]:
    app = build_app(Replica(load_settings(values)))
    with TestClient(app):
        yield app


@contextlib.contextmanager
def listening(**values: Any) -> Iterator[str]:
    """Where it does: schemathesis asks an app by itself in an event loop for each request, in which
    no job would live on.
    """
    app = build_app(Replica(load_settings(values)))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, "it serves")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


# Beyond what a document says of each field: rules that join fields, or come from the model. Each
# of them stands word for word in test_bad_input.
JOINED = {
    "after", "background", "crops_coords_top_left", "decoder", "guidance_scale", "image", "images",
    "input_reference", "loras", "mask", "num_frames", "num_inference_steps", "original_size",
    "output_compression", "partial_images", "prompt", "seconds", "seed", "size", "strength",
    "target_size", "timesteps", "variant", "video_id",
}  # fmt: skip


def test_every_answer_is_as_documented(lcm_checkpoint: Path, settings: dict[str, Any]) -> None:
    with serving(model=str(lcm_checkpoint), engine="onnxruntime", **settings) as app:
        schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config())
        num_answers = fuzz(schema)
    for label in ("POST /v1/images/generations", "POST /v1/images/edits"):
        assert num_answers[label, 200] >= 5, num_answers  # what is right was drawn, not refused
        assert num_answers[label, 400] >= 50, num_answers
    paths = schema.raw_schema["paths"]
    assert not [path for path in paths if "/videos" in path]  # this model draws none


def test_every_answer_about_clips_is_as_documented(
    clip_checkpoint: Path, settings: dict[str, Any]
) -> None:
    with listening(model=str(clip_checkpoint), engine="torch", **settings) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config(15))
        num_answers = fuzz(schema.include(path_regex="^/v1/videos"))
    assert num_answers["POST /v1/videos", 200] >= 5, num_answers
    assert num_answers["POST /v1/videos", 400] >= 50, num_answers
    assert num_answers["GET /v1/videos", 200] >= 5, num_answers
    for label in ("GET /v1/videos/{video_id}", "DELETE /v1/videos/{video_id}"):
        assert num_answers[label, 200] >= 3, num_answers  # of ids that it was told
        assert num_answers[label, 404] >= 1, num_answers


def config(max_examples: int = 30) -> SchemathesisConfig:
    return SchemathesisConfig.from_dict(
        {
            "seed": 20261121,
            "continue-on-failure": True,  # else the first thing it wonders at ends an operation
            "headers": {"Authorization": f"Bearer {KEY}"},
            "generation": {"deterministic": True, "max-examples": max_examples, "no-shrink": True},
            "phases": {"stateful": {"enabled": False}},  # no answer names another resource
        }
    )


def fuzz(schema: BaseSchema) -> Counter[tuple[str, int]]:
    """How often each operation answered what."""
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
    return num_answers


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
