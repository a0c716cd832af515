"""
Show a bundle to a colleague: pick purchases, watch the reasoning, compare the items with and without it.

    python recipes/page.py --bundle outputs/demo/bundle        # then open http://127.0.0.1:7860/page

What is added to the catalogue here lives in memory and ends with the page; the bundle on disk stays as it is. Nothing
is loaded from the network. Install: `pip install "r2ec_trl[page]"`. Hardware: whatever the model runs on.
"""

import importlib.util
from dataclasses import dataclass, field
from functools import partial

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.errors import UserError
from r2ec_trl.serving.recommender import Recommender


@dataclass
class PageArguments:
    """Which recommender, and where the page is."""

    bundle: str = field(metadata={"help": "Bundle folder or hub id."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Base model, if it lies elsewhere now."})
    device: str | None = field(default=None, metadata={"help": "Device; the GPU if there is one, by default."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let code that comes with the model run."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address; 0.0.0.0 lets other machines in."})
    port: int = field(default=7860, metadata={"help": "Port; 0 takes a free one."})


def main() -> None:
    [args] = parse((PageArguments,), description=__doc__)
    if importlib.util.find_spec("gradio") is None:
        raise UserError('gradio is not installed; run `pip install "r2ec_trl[page]"`.')
    import uvicorn

    from r2ec_trl.serving.page import mount_page
    from r2ec_trl.serving.server import make_app

    bundle = Bundle.load(args.bundle, args.model_name_or_path, args.device, trust_remote_code=args.trust_remote_code)
    bundle.folder = None  # changes stay in memory
    app = make_app(Recommender(bundle), mount=partial(mount_page, open_catalogue=True))
    uvicorn.run(app, host=args.host, port=args.port, access_log=False)


if __name__ == "__main__":
    run(main)
