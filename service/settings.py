"""Every setting of the service: one frozen tree, the only reader of the environment.

A key is, in this order of precedence, an argument of the application (YAML ``args`` or a flag of
``fourstep serve``), an environment variable ``FOURSTEP_<KEY>``, or its default here.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engines.facts import Defaults
from engines.order import DEFAULT_CACHE_DIR, Order

MIB = 1024 * 1024
MIN_TIMEOUT_S = 0.001  # no image is quicker: an H200's takes 22 ms, 1 step of it 4 (2026-11-26)
SamplerName = Literal["lcm", "ddim", "euler", "euler_ancestral", "tcd", "dpmpp_2m", "dpmpp_2m_sde"]
DecoderName = Literal["full", "tiny"]
OTLP_EXPORTER = "opentelemetry-exporter-otlp-proto-http"
ORIGIN = re.compile(r"https?://[a-z0-9.\-\[\]:]+")  # browsers send it in lower case, without path
BASE_URL = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+(/[A-Za-z0-9._~\-/]*)?")
IMPORTABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class SettingsError(ValueError):
    """A key is unknown or its value is refused; the message names it and the way out."""


class Settings(BaseSettings):
    """What one application (one model behind one route) needs to know."""

    model_config = SettingsConfigDict(
        env_prefix="FOURSTEP_", frozen=True, extra="forbid", protected_namespaces=()
    )

    # The model.
    model: str = Field(
        "demo-lcm", description="folder, single file, bundle, hub id or a shipped model's name"
    )
    unet: str | None = Field(
        None, description="folder, file or hub id of a UNet in place of the model's"
    )
    vae: str | None = Field(
        None, description="folder, file or hub id of a VAE in place of the model's"
    )
    tiny_vae: str | None = Field(
        None,
        description="folder, file or hub id of a tiny VAE beside the model's: what `decoder` "
        "`tiny` encodes and decodes by, and previews are made by; the demo models bring theirs",
    )
    motion_adapter: str | None = Field(
        None,
        description="folder, file or hub id of a motion adapter (AnimateDiff, AnimateLCM): "
        "Stable Diffusion draws clips",
    )
    t5_int8: bool = Field(False, description="the linear layers of a T5 encoder in 8 bits")
    vae_tiling_px: int = Field(
        0,
        ge=0,
        le=8192,
        description="images with a longer side are decoded in tiles of so many pixels a side, one "
        "a call, so that neither memory nor anybody else waits for a large one; 0: whole",
    )
    scheduler: dict[str, bool | int | float | str] = Field(
        {}, description="options over those of the model's scheduler config, by name"
    )
    architecture: str | None = Field(
        None, description="folder of configurations that fit a single file which says no known"
    )
    model_id: str | None = Field(None, description="name in the API; default: taken from `model`")
    aliases: tuple[str, ...] = Field((), description="further names the API accepts for the model")
    loras: dict[str, str | Path] = Field(
        {}, description="LoRAs a request may name: name → file, folder of safetensors or hub id"
    )
    embeddings: dict[str, str | Path] = Field(
        {}, description="textual inversions: word of a prompt → file, folder or hub id"
    )
    engine: Literal["auto", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "torch"] = "auto"
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8", "fp8"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="cpu: as if without a GPU")
    cache_dir: Path = Field(DEFAULT_CACHE_DIR, description="where built bundles are kept")
    serve_meanwhile: bool = Field(
        False, description="draw by torch at once where the engine's bundle must be built first"
    )
    num_threads: int = Field(0, ge=0, le=256, description="CPU threads of the engine; 0: all cores")

    # Batching. 0 takes the engine's own default, measured (see engines/README.md).
    max_batch: int = Field(0, ge=0, le=63, description="lanes of one denoise call")
    max_decode_batch: int = Field(0, ge=0, le=63, description="rows of one decode call")
    max_running: int = Field(64, ge=2, le=4096, description="lanes in flight, all sizes together")
    patience: int = Field(4, ge=0, le=1000, description="denoise calls that weigh as one step left")
    max_waiting: int = Field(256, ge=1, le=100_000, description="images accepted and unfinished")

    max_call_s: float = Field(
        120.0,
        gt=0,
        description="an engine call that takes longer makes the replica unhealthy",
    )

    # Limits of one request.
    max_images: int = Field(10, ge=1, le=10, description="n")
    max_steps: int = Field(50, ge=1, le=1000, description="num_inference_steps")
    max_prompt_chars: int = Field(4000, ge=1, le=32_000)
    max_body_bytes: int = Field(20 * MIB, ge=1024)
    max_held_bytes: int = Field(
        320 * MIB, ge=1024, description="of all bodies that are read or wait to be decoded"
    )
    body_timeout_s: float = Field(60.0, gt=0, le=3600, description="for a body to come in whole")
    max_input_px: int = Field(4096 * 4096, ge=64, description="pixels of an uploaded image")
    long_prompt: Literal["truncate", "refuse", "chunk"] = Field(
        "truncate",
        description="what happens to a prompt longer than the text encoder's window; chunk: it "
        "goes on in a second and third one",
    )
    request_timeout_s: float = Field(
        60.0, ge=MIN_TIMEOUT_S, le=3600, description="deadline; X-Request-Timeout"
    )
    unknown_fields: Literal["refuse", "ignore"] = Field(
        "refuse", description="what happens to fields that are none; ignored ones are warned of"
    )

    api_keys_file: Path | None = Field(
        None, description="file of NAME:SHA256 lines; with it /v1/ needs a key (see `fourstep key`)"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="origins whose pages may call the API, like https://shop.example; `*`: all"
    )

    safety: str | None = Field(
        None, description="filter of prompts and images: `diffusers` or your `module:attribute`"
    )
    safety_model: Path | None = Field(
        None, description="folder of `diffusers`' checker and its image processor, in safetensors"
    )

    # What a request gets that does not say; None: the model's own.
    default_loras: dict[str, float] = Field({}, description="name → weight λ, of `loras`")
    default_sampler: SamplerName | None = None
    default_steps: int | None = Field(None, ge=1, le=1000)
    default_timesteps: tuple[int, ...] | None = Field(
        None, min_length=1, description="descending, one for each of `default_steps`"
    )
    default_guidance: float | None = Field(None, ge=0, le=50)
    default_decoder: DecoderName | None = None

    # Live drawing, of one replica.
    max_live_sessions: int = Field(64, ge=0, le=4096, description="open at a time; 0: none are")
    max_live_sessions_of_key: int = Field(8, ge=1, le=4096, description="of one API key")
    live_max_fps: float = Field(30.0, gt=0, le=120, description="frames a second of a session")
    max_live_message_bytes: int = Field(4 * MIB, ge=1024, description="a frame and its mask")
    live_idle_s: float = Field(60.0, gt=0, le=3600, description="a session that is silent ends")

    # Answers.
    png_level: int = Field(
        1, ge=0, le=9, description="effort of PNG answers: 1 by our own fast path, others by zlib"
    )
    webp_method: int = Field(2, ge=0, le=6, description="libwebp effort of WebP answers")
    num_image_workers: int = Field(
        0, ge=0, le=64,
        description="threads that encode images; 0: one for four cores, 2 at least and 8 at most",
    )  # fmt: skip
    num_upload_workers: int = Field(
        1, ge=1, le=64, description="threads that decode uploads: 17 bytes a pixel of max_input_px"
    )
    public_url: str | None = Field(
        None, description="what clients reach this by, for `url` answers; default: as they asked"
    )
    image_files_s: float = Field(
        3600.0, ge=0, le=31 * 86_400, description="life of a `url`; 0: `data:` URLs, nothing kept"
    )
    image_files_bytes: int = Field(
        256 * MIB, ge=MIB, description="of all images kept for `url`; the oldest go first"
    )
    image_files_dir: Path | None = Field(
        None, description="where they are, for all replicas; default: `images` in `cache_dir`"
    )
    image_cache_bytes: int = Field(
        0, ge=0, description="images with explicit seeds, kept in memory for equal requests; 0: off"
    )
    video_timeout_s: float = Field(
        600.0, ge=MIN_TIMEOUT_S, le=86_400, description="deadline of a job; X-Request-Timeout"
    )
    video_files_s: float = Field(
        3600.0, gt=0, le=31 * 86_400, description="life of a job, and its clip, that is over"
    )
    video_files_bytes: int = Field(
        1024 * MIB, ge=MIB, description="of all clips kept; the next to expire go first"
    )
    video_files_dir: Path | None = Field(
        None, description="where they are, for all replicas; default: `videos` in `cache_dir`"
    )
    drain_s: float = Field(30.0, ge=0, description="time running work is given on shutdown")
    metrics_dir: Path | None = Field(
        None, description="folder that the replicas of a node share for their metrics; environment"
    )
    metrics_max_age_s: float = Field(
        1.0, ge=0, le=60, description="/metrics is made anew after so long, however often asked for"
    )
    traces: bool = Field(
        False, description="OpenTelemetry traces by OTLP (extra `otel`); OTEL_* variables say where"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: write scheme, host and port as browsers send it, "
                    "like https://shop.example or http://localhost:3000"
                )
        return origins

    @field_validator("public_url")
    @classmethod
    def _is_a_base_url(cls, url: str | None) -> str | None:
        if url is not None and not BASE_URL.fullmatch(url):
            raise ValueError(
                f"{url!r} is no base URL: write scheme, host and, where there is one, the path "
                "before /v1, like https://images.example or https://example.org/draw"
            )
        return None if url is None else url.rstrip("/")

    @model_validator(mode="after")
    def _safety_can_be_found(self) -> Settings:
        if self.safety == "diffusers" and self.safety_model is None:
            raise ValueError(
                "safety is 'diffusers' and safety_model is not set; give the folder of a Stable "
                "Diffusion checkpoint that has its safety_checker"
            )
        if self.safety not in (None, "diffusers") and not IMPORTABLE.fullmatch(self.safety or ""):
            raise ValueError(f"safety is {self.safety!r}; write 'diffusers' or 'module:attribute'")
        return self

    @property
    def order(self) -> Order:
        """What the replica loads, and what `fourstep serve` builds before it starts one."""
        return Order(
            model=self.model,
            backend=self.engine,
            precision=self.precision,
            cache_dir=self.cache_dir,
            num_threads=self.num_threads or None,
            max_batch=self.max_batch or None,
            loras=self.loras,
            serve_meanwhile=self.serve_meanwhile,
            device=self.device,
            unet=self.unet,
            vae=self.vae,
            tiny_vae=self.tiny_vae,
            motion_adapter=self.motion_adapter,
            t5_int8=self.t5_int8,
            vae_tiling_px=self.vae_tiling_px,
            scheduler=self.scheduler,
            architecture=self.architecture,
            embeddings=self.embeddings,
            long_prompts=self.long_prompt == "chunk",
            defaults=Defaults(
                self.default_sampler,
                self.default_steps,
                self.default_guidance,
                self.default_timesteps,
                self.default_decoder,
            ),
        )

    @model_validator(mode="after")
    def _traces_can_be_sent(self) -> Settings:
        try:
            if self.traces:
                importlib.metadata.version(OTLP_EXPORTER)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"traces needs the package {OTLP_EXPORTER}: pip install 'fourstep[otel]'"
            ) from None
        return self

    @model_validator(mode="after")
    def _default_loras_are_served(self) -> Settings:
        for name in self.default_loras:
            if name not in self.loras:
                known = ", ".join(self.loras) or "none"
                raise ValueError(f"default_loras names {name!r}, loras has {known}")
        return self


def share_metrics() -> Path | None:
    """Turn on prometheus_client's multiprocess mode where ``FOURSTEP_METRICS_DIR`` is set.

    Returns that folder. It must run before prometheus_client is imported. The variable has a name
    of its own because Ray's processes inherit the environment and would write theirs there as well.
    """
    folder = os.environ.get("FOURSTEP_METRICS_DIR")
    if folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    return Path(folder) if folder else None


def load_settings(values: Mapping[str, Any] | None = None) -> Settings:
    """Settings from ``values`` over the environment over the defaults.

    Raises:
        SettingsError: an unknown key (the nearest known one is named) or a refused value.
    """
    known = Settings.model_fields
    prefix = "FOURSTEP_"
    from_environment = [k.removeprefix(prefix).lower() for k in os.environ if k.startswith(prefix)]
    for key in (*(values or {}), *from_environment):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"unknown setting {key!r}{hint} (known: {', '.join(known)})")
    try:
        return Settings(**(values or {}))
    except ValidationError as error:
        lines = [
            f"setting {'.'.join(map(str, e['loc']))!r}: {e['msg'].lower()}, got {e['input']!r}"
            for e in error.errors()
        ]
        raise SettingsError("; ".join(lines)) from error
