"""A page in the browser, on this machine alone: a conversation with a model, beside a baseline if there is one.

gradio is optional and imported here only where a page is made.
"""

import importlib.util
import os
import socket
import threading
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from jax_backtrack.errors import InputError
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.seeds import reply_seed
from jax_backtrack.serving.conversation import Turn, answers, worth_drawing
from jax_backtrack.serving.conversation_page import STYLE, conversation_html
from jax_backtrack.utils.console import console

ADDRESS = "127.0.0.1"
BIASES = 10.0  # nats that the slider goes to, up and down
HOLD_BACK = 32  # tokens that the slider goes to
_WAITING = 32  # replies that may wait for their turn
_LEGEND = (
    "Bars: the probability of [RESET] in each token's place, by the model itself (without the bias), on a logarithmic "
    "scale from 0.01 % (no bar) to 100 %. The pointer on a token shows the number."
)
# Nothing is fetched from elsewhere or sent there, whatever stands in a text. gradio's own pages need the inline parts.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; form-action 'self'; base-uri 'self'"
)


class Session:
    """What one browser tab has said and heard. gradio copies an empty one for each."""

    def __init__(self):
        self.turns: list[Turn] = []
        self._writing: object | None = None

    def grow(self, turns: Iterator[Turn]) -> Iterator[Turn]:
        """Takes the next turn as it grows, until it has ended or the session was stopped in between."""
        before, mine = self.turns, object()
        self._writing = mine
        for turn in turns:
            if self._writing is not mine:
                return
            self.turns = [*before, turn]
            yield turn

    def stop(self) -> None:
        """Ends a turn that is growing."""
        self._writing = None
        self.turns = [turn.stop() for turn in self.turns]

    def clear(self) -> None:
        """Begins another conversation."""
        self._writing, self.turns = None, []


def check_possible(port: int = 0) -> None:
    """Raises InputError where gradio is not installed, or the port is taken; 0 is any."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("--mode=web needs gradio, which is optional: pip install -r requirements-web.txt")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a page that has just ended
        try:
            tried.bind((ADDRESS, port))
        except OSError as error:
            raise InputError(f"web.port = {port} of {ADDRESS} cannot be had: {error}; 0 is any that is free") from None


def page(samplers: Mapping[str, Sampler], *, seed: int = 0, bias: float = 0.0, hold_back: int = 0):
    """Builds the page as gradio's Blocks, not served yet; `serve` and `show` do that.

    samplers:  by the name that stands over their replies; those with `logprobs` have their [RESET] drawn
    seed:      that the seeds of a conversation's replies are derived from
    bias:      of [RESET], where its slider stands at first
    hold_back: tokens, where its slider stands at first
    """
    check_possible()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which gradio reads as it is imported
    import gradio as gr

    names, models = list(samplers), list(samplers.values())
    can_reset = any(sampler.tokenizer.reset_id is not None for sampler in models)

    def drawn(turns: list[Turn]) -> str:
        return conversation_html(turns, names)

    def reply(message: str, prefill: str, bias: float, hold_back: float, session: Session) -> Iterator[tuple[str, str]]:
        """Yields the message's box and the conversation, as the next turn grows."""
        if not message.strip():
            yield message, drawn(session.turns)
            return
        session.stop()
        turns = session.turns
        biased = [sampler.with_resets(reset_bias=bias) for sampler in models]
        grown = answers(
            biased, turns, message, prefill=prefill, seed=reply_seed(seed, len(turns)), hold_back=int(hold_back)
        )
        for turn in worth_drawing(session.grow(grown)):
            yield "", drawn([*turns, turn])

    def stop(session: Session) -> str:
        session.stop()
        return drawn(session.turns)

    def clear(session: Session) -> str:
        session.clear()
        return drawn([])

    with gr.Blocks(title="jax_backtrack", analytics_enabled=False) as blocks:
        session = gr.State(Session())
        conversation = gr.HTML(drawn([]), elem_id="conversation", apply_default_css=False)
        with gr.Row(equal_height=True):
            message = gr.Textbox(
                label="Message",
                placeholder="Ask something",
                lines=1,
                max_lines=8,
                scale=8,
                min_width=240,
                autofocus=True,
            )
            send = gr.Button("Send", variant="primary", scale=1, min_width=90)
            halt = gr.Button("Stop", scale=1, min_width=90)
        with gr.Row(equal_height=True):
            # The style sheet looks at these two, so they act at once, while a reply is written too.
            gr.Checkbox(True, label="Drafts", interactive=True, min_width=90, elem_id="show-drafts")
            gr.Checkbox(True, label="Probability of [RESET]", interactive=True, min_width=200, elem_id="show-chances")
            anew = gr.Button("New conversation", size="sm", min_width=160)
        with gr.Row():
            reset_bias = gr.Slider(
                min(-BIASES, bias),
                max(BIASES, bias),
                bias,
                step=0.5,
                label="Bias of [RESET], in nats",
                info="Lower: fewer resets" if can_reset else "This model has no [RESET]",
                interactive=can_reset,
                min_width=240,
            )
            held_back = gr.Slider(
                0,
                max(HOLD_BACK, hold_back),
                hold_back,
                step=1,
                label="Hold-back, in tokens",
                info="The newest tokens, which stay unseen",
                min_width=240,
            )
            prefill = gr.Textbox(
                label="First words of the reply", info="Written for the model, as an attacker would", min_width=240
            )
        gr.HTML(f'<div class="legend">{_LEGEND}</div>', apply_default_css=False)

        asked = gr.on(
            [message.submit, send.click],
            reply,
            [message, prefill, reset_bias, held_back, session],
            [message, conversation],
            # One reply at a time, whoever asks: two would share the same processor or chips.
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=message,
            api_name="reply",
        )
        for button, ended in (halt, stop), (anew, clear):
            # The browser first stops listening, or what was on its way would be drawn after this.
            cancelled = button.click(None, cancels=asked, api_visibility="private")
            cancelled.then(ended, session, conversation, queue=False, show_progress="hidden", api_visibility="private")
    return blocks.queue(max_size=_WAITING)


def show(blocks, port: int | None = None, *, inline: bool = False) -> str:
    """Serves a page in the background, to this machine only, and returns its address; `blocks.close()` ends it.

    port:   None for the first that is free from 7860 on
    inline: in a notebook, shows it below the cell
    """
    import gradio as gr
    from starlette.middleware import Middleware

    # Fonts of the machine, not of somebody's server; and notes that can be read.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme = theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
    _, address, _ = blocks.launch(
        share=False,
        server_name=ADDRESS,
        server_port=port,
        inline=inline,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        max_file_size=0,
        theme=theme,
        head=f"<style>{STYLE.read_text()}</style>",  # as `css` it would be confined to a part of the page
        app_kwargs={"middleware": [Middleware(_WithPolicy)]},
    )
    return address


def serve(samplers: Mapping[str, Sampler], config: ConfigDict) -> None:
    """Serves a page with a recipe's settings until Ctrl-C."""
    sample = config.sample
    blocks = page(samplers, seed=sample.seed, bias=config.sample.reset_bias, hold_back=sample.hold_back)
    try:
        console.print(f"page: {show(blocks, config.web.port or None)}", highlight=False)
        console.print("for this machine only; Ctrl-C ends", style="dim", highlight=False)
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print("ended", style="dim")
    finally:
        blocks.close(verbose=False)


class _WithPolicy:
    """Answers with a content security policy: browsers then load nothing for the page from elsewhere."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_with_policy)
