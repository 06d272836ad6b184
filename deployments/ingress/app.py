"""vLLM's FastAPI application over the mesh."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from opentelemetry.trace import Tracer
from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from expertmesh.deployments.ingress.access import add_walls
from expertmesh.deployments.ingress.access_rules import scope_for
from expertmesh.deployments.ingress.admission import Admission
from expertmesh.deployments.ingress.client import MeshEngineClient
from expertmesh.deployments.ingress.core import RemoteCore
from expertmesh.deployments.ingress.deadline import Deadlines
from expertmesh.deployments.ingress.mended_errors import mend_error_handling
from expertmesh.deployments.ingress.openapi import describe
from expertmesh.deployments.ingress.rendering import refuse_what_can_not_be_rendered
from expertmesh.deployments.ingress.responses import HonestResponses
from expertmesh.deployments.telemetry.ingress import OutcomeMiddleware
from expertmesh.deployments.tracing.front import RequestFront
from expertmesh.platform.access import INFER
from expertmesh.platform.config import MeshConfig

_NOT_OURS = ("/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1", "/load", "/metrics", "/v1/systemone")
"""vLLM's routes that speak of an engine in this process, where none is, or of what these models can't do."""
_SWITCHED_OFF = ("/render", "/derender")
"""Those that vLLM answers with 403 where its scale-out isn't asked for."""


def front_arguments(config: MeshConfig, folder: Path) -> Namespace:
    """The arguments of vLLM's API server for this config."""
    argv = [
        "--model",
        os.fspath(folder),
        "--served-model-name",
        config.model.name,
        "--dtype",
        config.model.engine_dtype,
    ]
    if config.model.max_model_len is not None:
        argv += ["--max-model-len", str(config.model.max_model_len)]
    argv += ["--disable-log-stats", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    for name, value in config.attention.engine_args.items():
        # What the engines validate prompts and build templates by, the front must know as well.
        if name in ("tokenizer", "tokenizer_mode", "trust_remote_code", "hf_overrides", "max_logprobs"):
            flag = f"--{name.replace('_', '-')}"
            argv += [flag] if value is True else [flag, str(value)]
    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    validate_parsed_serve_args(arguments)
    return arguments


def front_config(arguments: Namespace) -> VllmConfig:
    """vLLM's config of a process that renders and validates but has no device and no KV cache."""
    engine = AsyncEngineArgs.from_cli_args(arguments)
    model = engine.create_model_config()
    model.quantization = None  # nothing is loaded here; the check of its kernels would ask for a device
    return VllmConfig(
        model_config=model,
        logging_config=engine.create_logging_config(),
        structured_outputs_config=engine.create_structured_outputs_config(),
    )


async def openai_app(
    config: MeshConfig,
    folder: Path,
    core: RemoteCore,
    healthy: Callable[[], Awaitable[bool]],
    tracer: Tracer | None = None,
) -> FastAPI:
    """The application, ready to serve. tracer: None traces no request."""
    arguments = front_arguments(config, folder)
    ingress = config.ingress
    client = MeshEngineClient(front_config(arguments), core, healthy, ingress.max_ongoing_requests, ingress.max_wait_s)
    app = build_app(arguments, ("generate",), client.model_config)
    app.router.routes[:] = [route for route in app.router.routes if _is_ours(getattr(route, "path", ""))]
    await init_app_state(client, app.state, arguments, ("generate",))
    refuse_what_can_not_be_rendered(app.state.online_renderer)
    mend_error_handling(app)
    app.middleware_stack = None  # vLLM's instrumentation has built it already; these go around that
    app.add_middleware(Admission, check=client.check_admission)
    app.add_middleware(HonestResponses)
    app.add_middleware(Deadlines)
    add_walls(app, ingress)
    app.add_middleware(OutcomeMiddleware, metrics=core.metrics)  # around the walls: what they refuse is an outcome
    app.add_middleware(
        RequestFront,
        tracer=tracer,
        model=config.model.name,
        is_traced=lambda path: scope_for(path) == INFER,
        routes=lambda: frozenset(getattr(route, "path", "") for route in app.routes),
    )
    describe(app)
    return app


def _is_ours(path: str) -> bool:
    return not path.startswith(_NOT_OURS) and not path.endswith(_SWITCHED_OFF)
