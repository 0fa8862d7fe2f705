"""Tokenizer of a run: a byte-level BPE trained on its documents, or a given tokenizer.json (`tokenizers` library)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from base import storage
from base.errors import DataError

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, bos_id: int, eos_id: int, more_special: Sequence[str] = ()
) -> Tokenizer:
    """Byte-level BPE tokenizer (like GPT-2's) of at most `vocab_size` tokens, trained on `texts`. Deterministic.

    Args:
        more_special: control tokens after bos, eos and the roles.

    Raises:
        DataError: `bos_id` and `eos_id` are not 0 and 1, the ids that a trained tokenizer has.
    """
    if (bos_id, eos_id) != (0, 1):
        raise DataError(
            f"a tokenizer that is trained here has bos 0 and eos 1, the model has {bos_id} and {eos_id}. "
            "Give data.tokenizer, or set model.bos_token_id=0 and model.eos_token_id=1."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, *ROLE_TOKENS.values(), *more_special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_plain_text(tokenizer)


def load_tokenizer(uri: str) -> Tokenizer:
    """Tokenizer of a tokenizer.json.

    Raises:
        MissingFileError: there is no file at `uri`.
        DataError: the file is not a tokenizer.
    """
    content = storage.read_bytes(uri)
    try:
        return _as_plain_text(Tokenizer.from_buffer(content))
    except Exception as error:  # the library raises nothing more specific
        raise DataError(
            f"{uri}: not a tokenizer.json that the tokenizers library reads: {error}. Export or copy it again."
        ) from error


def check_fit(tokenizer: Tokenizer, origin: str, *, vocab_size: int, bos_id: int, eos_id: int) -> None:
    """Check that a tokenizer fits the model.

    Args:
        origin: path or URI, for the error.

    Raises:
        DataError: a token id is not below `vocab_size`, or bos or eos is not one of the tokenizer's added tokens
            (then ordinary text would begin and end documents).
    """
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= vocab_size:
        raise DataError(
            f"{origin}: has tokens up to id {highest}, model.vocab_size is {vocab_size}. "
            "They do not belong together: give another tokenizer, or set model.vocab_size."
        )
    added = tokenizer.get_added_tokens_decoder()
    for key, token in (("bos_token_id", bos_id), ("eos_token_id", eos_id)):
        if token not in added:
            raise DataError(
                f"{origin}: model.{key} must be one of its added tokens, got {token}, which is "
                f"{tokenizer.id_to_token(token)!r}. Set model.{key}; its added tokens begin with "
                f"{ {number: added[number].content for number in sorted(added)[:5]} }."
            )


def _as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, set to encode documents without truncation or padding, and special tokens' names as plain text.

    Otherwise a document that contains the name of a special token could end itself or begin another.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
