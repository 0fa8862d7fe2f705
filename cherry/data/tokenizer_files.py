"""Which tokenizer and which chat template a run takes: named files, those beside given weights, or defaults."""

from __future__ import annotations

from tokenizers import Tokenizer

from base import storage
from base.errors import DataError, MissingFileError
from cherry.data.chat_template import ChatTemplate
from cherry.data.tokenizer import ROLE_TOKENS
from cherry.job_config import DataConfig
from model.weights.companion_files import SourceFiles

_TOKENIZER = "tokenizer.json"
_OTHER_KINDS = ("tiktoken.model", "tokenizer.model", "spiece.model", "vocab.json")
# As in the chat_template of DeepSeek-V3's released tokenizer_config.json: system texts come first, without a marker,
# and only the assistant's text ends with eos.
_DEEPSEEK_ROLES = ("<｜User｜>", "<｜Assistant｜>")
_NO_OTHER_ROLE = "{{ raise_exception('a role must be system, user or assistant, got ' + message['role']) }}"
_DEEPSEEK_TEMPLATE = (
    "{% set ns = namespace(system='', first=true) %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set ns.system = ns.system + ('' if ns.first else '\\n\\n') + message['content'] %}{% set ns.first = false %}"
    "{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% elif message['role'] != 'system' %}" + _NO_OTHER_ROLE + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def tokenizer_uri(config: DataConfig, weights: str | None) -> str | None:
    """URI of the tokenizer.json of a run; `None` where one is to be trained.

    Args:
        weights: folder of the weights that the run starts from; they are of their own tokenizer.

    Raises:
        MissingFileError: there is no file at data.tokenizer.
        DataError: the folder holds a tokenizer of another kind, or the weights have none.
    """
    if config.tokenizer is not None:
        uri = config.tokenizer if storage.is_file(config.tokenizer) else storage.join(config.tokenizer, _TOKENIZER)
        if not storage.exists(uri):
            _refuse_other_kinds(config.tokenizer)
            raise MissingFileError(
                f"data.tokenizer {config.tokenizer}: no file there. Give a tokenizer.json, or a folder that holds one."
            )
        return uri
    if weights is None:
        return None
    uri = storage.join(weights, _TOKENIZER)
    if not storage.exists(uri):
        _refuse_other_kinds(weights)
        raise DataError(
            f"{weights}: has no {_TOKENIZER}, and given weights mean nothing under a new tokenizer. Copy theirs there, "
            "or name it by data.tokenizer."
        )
    return uri


def _refuse_other_kinds(folder: str) -> None:
    found = [name for name in _OTHER_KINDS if storage.exists(storage.join(folder, name))]
    if found:
        raise DataError(
            f"{folder}: holds {' and '.join(found)} in place of {_TOKENIZER}, which the tokenizers library does not "
            "read. Convert it: transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(other folder) writes "
            f"a {_TOKENIZER} for most; name that by data.tokenizer."
        )


def chat_template(
    config: DataConfig, tokenizer: Tokenizer, uri: str | None, *, bos_id: int, eos_id: int
) -> ChatTemplate:
    """Chat template of a run: data.chat_template, the tokenizer's own, or the default for its role tokens.

    Args:
        uri: the tokenizer's, whose template lies beside it.

    Raises:
        MissingFileError: there is no file at data.chat_template.
        DataError: not a template.
        WeightsError: a file beside the tokenizer is damaged.
    """
    given = _given_template(config, uri)
    if given is None:
        return default_template(tokenizer, bos_id=bos_id, eos_id=eos_id)
    return ChatTemplate(*given, _special_tokens(tokenizer, bos_id, eos_id))


def _given_template(config: DataConfig, uri: str | None) -> tuple[str, str] | None:
    """Template and where it comes from: data.chat_template, or what lies beside the tokenizer at `uri`."""
    if config.chat_template is not None:
        return _read_text(config.chat_template), config.chat_template
    folder, _, name = (uri or "").rpartition("/")
    if name != _TOKENIZER:
        return None
    source = SourceFiles(folder or ".").default_template
    return None if source is None else (source, f"the one in {folder or '.'}")


def given_files(config: DataConfig, weights: str | None) -> dict[str, str]:
    """SHA-256 of the tokenizer and of the chat template that the data is to be prepared with, as far as they are given.

    Raises:
        MissingFileError, DataError: see `tokenizer_uri`.
    """
    uri = tokenizer_uri(config, weights)
    found = {} if uri is None else {"tokenizer_digest": storage.digest(uri)}
    if config.format == "chat":
        template = _given_template(config, uri)
        if template is not None:
            found["chat_template_digest"] = storage.fingerprint(template[0])
    return found


def saved_template(uri: str, tokenizer: Tokenizer, *, bos_id: int, eos_id: int) -> ChatTemplate | None:
    """The template that prepared data was written with, at `uri`; `None` where there is none."""
    if not storage.exists(uri):
        return None
    return ChatTemplate(_read_text(uri), uri, _special_tokens(tokenizer, bos_id, eos_id))


def default_template(tokenizer: Tokenizer, *, bos_id: int, eos_id: int) -> ChatTemplate:
    """DeepSeek-V3's chat template if the tokenizer has its role tokens; else `(role text eos)*`.

    In the latter a role is a special token of a tokenizer trained here, else the role's name and a line break.
    """
    if all(tokenizer.token_to_id(token) is not None for token in _DEEPSEEK_ROLES):
        source, origin = _DEEPSEEK_TEMPLATE, "the default, like that of DeepSeek-V3"
    else:
        names = {
            role: token if tokenizer.token_to_id(token) is not None else f"{role}\\n"
            for role, token in ROLE_TOKENS.items()
        }
        turns = "".join(
            f"{{% {'elif' if place else 'if'} message['role'] == '{role}' %}}"
            f"{{{{ '{name}' + message['content'] + eos_token }}}}"
            for place, (role, name) in enumerate(names.items())
        )
        source = (
            "{{ bos_token }}{% for message in messages %}" + turns + "{% else %}" + _NO_OTHER_ROLE + "{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}{{ '" + names["assistant"] + "' }}{% endif %}"
        )
        origin = "the default"
    return ChatTemplate(source, origin, _special_tokens(tokenizer, bos_id, eos_id))


def _special_tokens(tokenizer: Tokenizer, bos_id: int, eos_id: int) -> dict[str, str | None]:
    return {"bos_token": tokenizer.id_to_token(bos_id), "eos_token": tokenizer.id_to_token(eos_id)}


def _read_text(uri: str) -> str:
    try:
        return storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: must be UTF-8 text, got {error}. Save it again.") from error
