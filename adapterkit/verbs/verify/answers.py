"""Models that answer, in transformers: log-probabilities of the next token, in float32 whatever the weights' dtype."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapterkit.errors import AdapterkitError, UsageError, option
from adapterkit.ops.device import CPU, opened
from adapterkit.packages import need

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


class Answering(Protocol):
    """Something that gives, for a sequence of tokens, the distribution of the token after each of some positions."""

    name: str

    def logprobs(self, ids: Sequence[int], positions: Sequence[int]) -> Floats:
        """Float32 ``[positions, vocabulary]``."""

    def close(self) -> None:
        """Give back what it holds."""


def need_transformers() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    need("transformers", "tokenizers", what="the level model runs models in transformers", extra="demo")
    import transformers

    return transformers


def check_known(config: Mapping[str, Any], ref: str) -> None:
    """Whether transformers can run a model with this config.

    Raises:
        UsageError: it does not know the type, or this is no language model.
    """
    transformers = need_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = str(config.get("model_type") or "")
    if kind not in CONFIG_MAPPING_NAMES:
        raise UsageError(
            f"{ref} is a '{kind}', which transformers {transformers.__version__} does not know, so it cannot answer",
            f"use {option('level', 'tensors')} or {option('level', 'layers')}, which need no model",
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The library's progress bars and warnings are not what a verification is about."""
    transformers = need_transformers()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class InTransformers:
    """A model in transformers, in float32.

    Args:
        folder: a Hugging Face folder.
        adapter: a PEFT folder, which stays beside the weights.
        gguf: a GGUF file in that folder, which the library decodes.
        device: where it runs.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        adapter: Path | None = None,
        *,
        gguf: str | None = None,
        device: str = CPU,
    ) -> None:
        self.name = name
        self._device = opened(device)
        more = {} if gguf is None else {"gguf_file": gguf}
        transformers = need_transformers()
        import torch

        try:
            with quiet():
                config = transformers.AutoConfig.from_pretrained(folder, **more)
                made = _class(transformers, config)
                self._model: Any = made.from_pretrained(folder, dtype=torch.float32, **more)
                if adapter is not None:
                    import peft

                    self._model = peft.PeftModel.from_pretrained(self._model, adapter)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError) as error:
            why = " ".join(str(error).split())[:200]
            raise AdapterkitError(
                f"transformers cannot load {folder}: {why}", f"use {option('level', 'layers')}"
            ) from None
        self._model.eval()
        if not self._device.here:
            with self._device.models():
                self._model.to(self._device.place)
        self._decoder = bool(getattr(config, "is_encoder_decoder", False))
        text = config.get_text_config()
        self.context = int(getattr(text, "max_position_embeddings", 0) or 0)
        self.vocabulary = int(getattr(text, "vocab_size", 0) or 0)

    def logprobs(self, ids: Sequence[int], positions: Sequence[int]) -> Floats:
        import numpy as np
        import torch

        tokens = self._device.up(torch.tensor([list(ids)]))
        more = {"decoder_input_ids": tokens} if self._decoder else {}
        with torch.inference_mode(), quiet(), self._device.models():
            found = self._model(input_ids=tokens, **more)
        logits = getattr(found, "logits", None)
        if logits is None or logits.ndim != 3 or logits.shape[1] != len(ids):
            raise UsageError(f"{self.name} gives no distribution over tokens", f"use {option('level', 'layers')}")
        chosen = self._device.down(logits[0, torch.tensor(list(positions))].float())
        return np.asarray(torch.log_softmax(chosen, -1).numpy(), dtype=np.float32)

    def close(self) -> None:
        self._model = None


def _class(transformers: Any, config: Any) -> Any:
    """The class that the config names, else what the library makes of its type."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def empty_model(config: Mapping[str, Any]) -> Any:
    """A model of a config whose parameters have no values; its buffers have theirs."""
    import torch

    transformers = need_transformers()
    made = transformers.AutoConfig.for_model(**{**config, "model_type": str(config["model_type"])})
    made._attn_implementation = "eager"
    register = torch.nn.Module.register_parameter

    def empty(self: Any, name: str, parameter: Any) -> None:
        register(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = empty  # type: ignore[assignment]
    try:
        with quiet():
            return _class(transformers, made)(made).eval()
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


class Tokenizer:
    """From prompts to token numbers and back.

    Args:
        folders: looked through in turn; the first that holds a tokenizer is taken.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._tokenizer = open_tokenizer(folders)

    def ids(self, text: str, messages: Sequence[Mapping[str, str]] = ()) -> list[int]:
        """The tokens of a text or of a chat.

        Raises:
            UsageError: there is no tokenizer, or no chat template.
        """
        if self._tokenizer is None:
            raise UsageError(
                "neither MERGED nor the base has a tokenizer, so prompts cannot be read",
                'add tokenizer.json, or give token numbers in a .jsonl file: {"ids": [1, 5, 17]}',
            )
        if not messages:
            return list(self._tokenizer(text)["input_ids"])
        try:
            return list(self._tokenizer.apply_chat_template(list(messages), return_dict=False))
        except ValueError:
            raise UsageError("the tokenizer has no chat template for 'messages'", "give prompts as text") from None

    def text(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return str(self._tokenizer.decode(list(ids)))


def open_tokenizer(folders: Sequence[str | Path]) -> Any:
    transformers = need_transformers()
    for folder in folders:
        names = {path.name for path in Path(folder).iterdir()} if Path(folder).is_dir() else set()
        if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"}:
            continue
        try:
            with quiet():
                return transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            why = " ".join(str(error).split())[:160]
            raise UsageError(f"the tokenizer in {folder} cannot be read: {why}", "copy the base's tokenizer") from None
    return None
