"""Every model type of the installed transformers is known to the table of names, or stands here with the reason.

A release with a new type makes this fail: run ``tools/make_names.py`` and ``tools/make_classes.py``, and look at what
`python -m bench.proofs.sweep --only TYPE` says of it.
"""

from __future__ import annotations

import pytest

from adapterkit.adapters.classes import table as classes
from adapterkit.adapters.renamings import table as names

auto = pytest.importorskip("transformers.models.auto.configuration_auto")

# Types that no model class of their own has: nothing is ever saved with one as the type of the whole.
_PART = "the config of a part; the whole model's class is in the table and holds it"
REASONS = {
    **dict.fromkeys(
        (
            *("edgetam_mask_decoder", "edgetam_prompt_encoder", "edgetam_video_mask_decoder"),
            *("edgetam_video_prompt_encoder", "sam2_mask_decoder", "sam2_prompt_encoder", "sam2_video_mask_decoder"),
            *("sam2_video_prompt_encoder", "sam3_geometry_encoder", "sam3_lite_text_geometry_encoder"),
            *("sam3_tracker_mask_decoder", "sam3_tracker_prompt_encoder", "sam3_tracker_video_mask_decoder"),
            *("sam3_tracker_video_prompt_encoder", "sam_hq_mask_decoder", "sam_hq_prompt_encoder", "sam_mask_decoder"),
            *("sam_prompt_encoder", "florence_vision", "gemma4_unified_audio", "gemma4_unified_vision"),
            *("idefics_perciever", "idefics_vision", "kosmos_2_5_vision_model", "kosmos_2_vision_model"),
            *("minicpmv4_6_vision", "phi4_multimodal_audio", "pix2struct_vision_model", "pp_chart2table_vision"),
            *("sapiens2_head", "t5_gemma_module", "vibevoice_diffusion"),
        ),
        _PART,
    ),
    "EvollaModel": "the name of a class that stands among the types; the type is evolla",
    "fastspeech2_conformer_hifigan": "a vocoder of convolutions with weight norm, which PEFT's names reach as they are",
    "higgs_audio_v2_tokenizer": "needs torchaudio to be imported; its names are those of its file",
    "layoutxlm": "a processor for layoutlmv2, which is the type in the files",
    "nougat": "a processor for vision-encoder-decoder, which is the type in the files",
    "pp_chart2table": "the class GotOcr2ForConditionalGeneration with another processor",
    "speecht5_hifigan": "a vocoder of convolutions with weight norm, which PEFT's names reach as they are",
    "vitmatte": "its default config cannot be built with this release; its names are those of its file",
}


def known() -> set[str]:
    return set(names()["types"]) | {row[0] for row in names()["classes"].values()}


def test_every_type_of_transformers_is_known_or_has_a_reason() -> None:
    strange = sorted(set(auto.CONFIG_MAPPING_NAMES) - known() - set(REASONS))
    assert strange == [], "run tools/make_names.py and tools/make_classes.py with this release"


def test_no_reason_is_left_for_a_type_that_is_known() -> None:
    assert sorted(set(REASONS) & known()) == []


def test_every_class_of_a_task_is_known_or_could_not_be_built() -> None:
    """The classes of PEFT's own tasks, which heads are written for."""
    from transformers.models.auto import modeling_auto

    missing = set()
    for task, table in (
        ("SEQ_CLS", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("TOKEN_CLS", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
        ("QUESTION_ANS", modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    ):
        for kind, name in table.items():
            first = name if isinstance(name, str) else name[0]
            assert classes()["tasks"][task].get(kind) == first, f"{task} of {kind}"
            if first not in classes()["heads"]:
                missing.add(first)
    assert sorted(missing) == sorted(UNBUILT & missing)


# Classes whose head could not be looked at when the table was made; a merge into one says that it was not checked.
UNBUILT = frozenset(
    {
        "LayoutLMv2ForQuestionAnswering",  # detectron2
        "LayoutLMv2ForSequenceClassification",
        "LayoutLMv2ForTokenClassification",
    }
)
