"""Messages to prompt ids, through the model's chat template."""

from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer
from server.schemas import ChatCompletionRequest, TokenizeRequest


def encode_chat(
    body: ChatCompletionRequest, tokenizer: Tokenizer, trust_templates: bool
) -> list[int]:
    """Render and encode the messages. Raises InvalidRequest naming the field to blame."""
    if body.chat_template is not None and not trust_templates:
        raise InvalidRequest(
            "chat_template is only accepted with --trust-request-templates",
            "chat_template",
            "unsupported_parameter",
        )
    if body.tools:
        raise InvalidRequest("tools are not supported", "tools", "unsupported_parameter")
    if body.tool_choice not in (None, "none"):
        raise InvalidRequest(
            "tool_choice is not supported, except as none", "tool_choice", "unsupported_parameter"
        )
    text = tokenizer.render_chat(
        [message.for_template() for message in body.messages],
        body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        **({"documents": body.documents} if body.documents is not None else {}),
        **({"chat_template": body.chat_template} if body.chat_template else {}),
    )
    return tokenizer.encode(text, add_special_tokens=body.add_special_tokens)


def encode_for_tokenize(body: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """What POST /tokenize answers with."""
    if body.messages is None:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return tokenizer.encode(body.prompt or "", add_special_tokens=special)
    text = tokenizer.render_chat(
        [message.for_template() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt,
    )
    return tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
