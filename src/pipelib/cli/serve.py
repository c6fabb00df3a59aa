"""`pipelib serve`: models for the browser, and for programs that know OpenAI's endpoints."""

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from pipelib.cli.command import Command, option
from pipelib.errors import UserError, tell

if TYPE_CHECKING:
    import uvicorn

    from pipelib.serving.engine import Engine, Served

EXAMPLES = """examples:
  pipelib serve                               the model of the workspace, at http://127.0.0.1:8000
  pipelib serve --run HEAD --run workspace    two runs, side by side on the page
  pipelib serve --model ../other/models --port 8080

  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What does numpy.clip do?"}]}'
"""
KEY = "PIPELIB_API_KEY"


@dataclass(frozen=True)
class Serve(Command):
    """Serve models until Ctrl-C."""

    command = "serve"
    help = "serve models: a page to talk to them, and OpenAI's endpoints"
    description = (
        "Load models and answer over HTTP: a page for the browser at /, and /v1/models, /v1/completions and /v1/chat/completions "
        "as OpenAI's clients expect them. Requests are answered together, one token of each at a time."
    )
    examples = EXAMPLES

    model: tuple[Path, ...] | None = option(
        "Hugging Face folder; may be repeated; default: chat/model if it is there, else models",
        default=None,
        nargs="+",
        action="extend",
        metavar="DIR",
    )
    run_: tuple[str, ...] | None = option(
        "the model of a run: workspace, the folder of a checkout, a git revision, or a DVC experiment; may be repeated",
        default=None,
        nargs="+",
        action="extend",
        metavar="NAME",
    )
    host: str = option(
        "address to listen at; default: 127.0.0.1, this machine alone", default="127.0.0.1", metavar="IP"
    )
    port: int = option("port; 0 for a free one; default: 8000", default=8000, metavar="N")
    api_key: str | None = option(
        f"the key that clients must send as a bearer token; better set ${KEY}, since other users can see command lines; default: "
        "no key",
        default=None,
        metavar="KEY",
    )
    slots: int = option(
        "the most texts that are generated at the same time, per model; default: 16", default=16, metavar="N"
    )
    queue: int = option(
        "the most texts that wait for a slot, per model; further requests get status 429; default: 64",
        default=64,
        metavar="N",
    )
    precision: Literal["fp32", "bf16"] = option("arithmetic of matrix products; default: fp32", default="fp32")
    reproducible: bool = option(
        "an answer does not depend on what else is asked at the same time, to the bit: one thread, fixed shapes; slower",
        default=False,
    )

    def run(self) -> int:
        """Serve until a signal.

        Raises:
            UserError: a model cannot be read or does not fit, or the port cannot be used.
        """
        import uvicorn

        from pipelib.serving.engine import Engine
        from pipelib.serving.http import Server

        if self.slots < 1:
            raise UserError(f"--slots {self.slots}: no text could be generated; give 1 or more.")
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"--port {self.port} is not a port; give 0 to 65535.")
        if self.api_key == "":
            raise UserError(
                "--api-key is empty, so everyone could use this server; give a key, or leave the option out."
            )
        if self.queue < 0:
            raise UserError(f"--queue {self.queue} is negative; give 0 or more.")
        with ExitStack() as stack:
            listener = stack.enter_context(self._listen())
            folders = {name: stack.enter_context(folder) for name, folder in self._folders()}
            engines = {
                name: Engine(self._read(name, folder), self.slots, self.queue, fixed_shapes=self.reproducible)
                for name, folder in folders.items()
            }
            for engine in engines.values():
                engine.start()
            key = self.api_key or os.environ.get(KEY, "")
            is_local = ip_address(listener.getsockname()[0]).is_loopback
            if not (is_local or key):
                tell(
                    f"serve: everyone who reaches {self.host} can use this server; --api-key asks for a key", error=True
                )
            app = Server(engines, api_key=key, is_local=is_local).app
            host = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{host}:{listener.getsockname()[1]}"
            for engine in engines.values():
                _describe(engine)
            tell(f"serve: {address} in a browser, {address}/v1 for OpenAI's clients; Ctrl-C ends")
            config = uvicorn.Config(
                app,
                log_level="error",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=1,
                server_header=False,
            )
            _serve(config, listener, engines)
        return 0

    def _folders(self) -> Iterator[tuple[str, AbstractContextManager[Path]]]:
        """The models by name, each with what gives its folder."""
        from pipelib.inspection.run_model import model_of_run, workspace_model

        named: list[tuple[str, AbstractContextManager[Path]]] = [(run, model_of_run(run)) for run in self.run_ or ()]
        named += [(folder.as_posix(), nullcontext(folder)) for folder in self.model or ()]
        names = [name for name, _ in named]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{twice} is named twice, and clients could not tell which they mean; name it once.")
        yield from named or [(folder.as_posix(), nullcontext(folder)) for folder in [workspace_model()]]

    def _read(self, name: str, folder: Path) -> "Served":
        import torch

        from pipelib.model.device import pick_device, require_support
        from pipelib.model.huggingface import import_model, read_chat_template
        from pipelib.serving.engine import Served
        from pipelib.vocabulary.chat import ChatTemplate
        from pipelib.vocabulary.choice import chosen_tokenizer, tokenizer_of_model

        tokenizer = tokenizer_of_model(folder, chosen_tokenizer())
        device = pick_device()
        require_support(device, self.precision)
        if self.reproducible:
            torch.set_num_threads(1)
        model = import_model(folder, tokenizer).eval().to(device)
        jinja, template = read_chat_template(folder), ChatTemplate.of(tokenizer)
        if jinja and jinja != template.jinja:
            tell(
                f"serve: {name} has a chat template of its own, which is not run here, so it completes texts but answers no chat",
                error=True,
            )
        return Served(name, model, tokenizer, template if jinja == template.jinja else None, self.precision)

    def _listen(self) -> socket.socket:
        """Take the port before the models are loaded."""
        try:
            family, _, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"the server cannot listen on {self.host}:{self.port} ({getattr(error, 'strerror', None) or error}), so no "
                "client could connect; choose another port (--port 0 takes a free one), or stop the program that uses this one."
            ) from None


def _describe(engine: "Engine") -> None:
    served = engine.served
    how = "answers" if served.template else "continues texts"
    tell(
        f"serve: {served.name}: {served.model.params.title}, context {served.context_length:,}, {how}; {engine.slots} slots on "
        f"{served.model.device}, {served.precision}"
    )


def _serve(config: "uvicorn.Config", listener: socket.socket, engines: "dict[str, Engine]") -> None:
    """Answer until a signal. The engines end first, so that clients are told."""
    import uvicorn

    class Ending(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
            for engine in engines.values():
                engine.close()
            # uvicorn would send itself the signal again at the end, and nothing would be cleaned up.
            self.force_exit, self.should_exit = self.should_exit, True

    Ending(config).run(sockets=[listener])
