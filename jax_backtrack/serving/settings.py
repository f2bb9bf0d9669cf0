"""Settings of `--mode=web`."""

from jax_backtrack.utils.settings import field, section


@section("web")
class WebSettings:
    """A conversation in the browser."""

    baseline: str = field("", 'Path, as of `model.path`, of a second model that answers beside the first; `""`: none.')
    port: int = field(7860, "Port of 127.0.0.1; 0 for the first that is free from 7860 on.", least=0, most=65535)
