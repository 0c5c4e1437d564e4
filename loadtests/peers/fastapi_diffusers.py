"""FastAPI over diffusers' own pipeline, as a newcomer would write it: one image at a time.

Its engine is torch, not the exported graph: this row shows what the whole path is worth, the
others what serving alone is.
"""

from __future__ import annotations

import io
import threading

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel

from engines.build.source import resolve
from loadtests.peers.drawing import Options


class Body(BaseModel):
    """One image."""

    prompt: str
    seed: int
    num_inference_steps: int
    size: str


def build(model: str) -> FastAPI:
    folder = resolve(model)
    pipeline = DiffusionPipeline.from_pretrained(folder or model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    lock = threading.Lock()  # a pipeline is not safe to share between threads
    app = FastAPI()

    @app.get("/ready")
    def ready() -> str:
        return "ready"

    @app.post("/generate")
    def generate(body: Body) -> Response:
        width, _, height = body.size.partition("x")
        with lock, torch.inference_mode():
            image = pipeline(
                body.prompt,
                width=int(width),
                height=int(height),
                num_inference_steps=body.num_inference_steps,
                generator=torch.Generator().manual_seed(body.seed),
            ).images[0]
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    return app


if __name__ == "__main__":
    options = Options.parse()
    uvicorn.run(build(options.model), host="127.0.0.1", port=options.port, log_level="warning")
