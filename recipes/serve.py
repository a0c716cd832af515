"""
Serve a bundle over HTTP: recommendations in batches, reasonings as they are written, a catalogue that can change.

    python recipes/serve.py --bundle outputs/demo/bundle
    curl -s localhost:8000/v1/recommend -H 'Content-Type: application/json' \
        -d '{"users": [{"history_titles": ["orrin red cello strings", "orrin blue cello tuner"]}], "k": 3}'

http://localhost:8000/docs lists the requests, /page is a page to try it in (extra `page`), /metrics
is for Prometheus. Who sends the token in R2EC_TRL_TOKEN may change the catalogue, nobody without it. SIGTERM answers
what is waiting, then ends. Install: `pip install "r2ec_trl[serve]"`. Hardware: whatever the model runs on.
"""

import importlib.util
import logging
import os
from dataclasses import dataclass, field
from functools import partial

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.cli.bundle_choice import BundleArguments, writer_of
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.errors import UserError
from r2ec_trl.serving.recommender import Recommender


@dataclass
class ServeArguments:
    """Which recommender, and where it listens."""

    bundle: str = field(metadata={"help": "Bundle folder or hub id."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Base model, if it lies elsewhere now."})
    engine: str = field(
        default="transformers", metadata={"help": "What writes the reasonings.", "choices": ["transformers", "vllm"]}
    )
    device: str | None = field(default=None, metadata={"help": "Device; the GPU if there is one, by default."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let code that comes with the model run."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address; 0.0.0.0 lets other machines in."})
    port: int = field(default=8000, metadata={"help": "Port; 0 takes a free one."})
    page: bool = field(default=True, metadata={"help": "Mount the page under /page where Gradio is installed."})


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f'{name} is not installed; run `pip install "r2ec_trl[serve]"`.')
    import uvicorn

    from r2ec_trl.serving.messages import Limits, reasoning_price
    from r2ec_trl.serving.server import TOKEN_VARIABLE, make_app

    args, limits = parse((ServeArguments, Limits), description=__doc__)
    bundle = Bundle.load(args.bundle, args.model_name_or_path, args.device, trust_remote_code=args.trust_remote_code)
    named = BundleArguments(bundle=args.bundle, engine=args.engine, trust_remote_code=args.trust_remote_code)
    token, mount = os.environ.get(TOKEN_VARIABLE) or None, None
    if args.page and importlib.util.find_spec("gradio") is not None:
        from r2ec_trl.serving.page import mount_page

        mount = partial(mount_page, token=token)
    if token and bundle.folder is None:
        raise UserError(
            f"{TOKEN_VARIABLE} lets the catalogue be changed, and changes of the hub's {args.bundle} would be lost at "
            "the end; download it and serve the folder, or unset the variable."
        )
    app = make_app(Recommender(bundle), limits, token, mount, writer_of(named, bundle))
    logging.info("Without reasoning: %s", reasoning_price(bundle.meta.metrics))
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        access_log=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(limits.deadline) + 1,
        limit_concurrency=4 * limits.max_queue + 1000,
    )


if __name__ == "__main__":
    run(main)
