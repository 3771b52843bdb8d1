"""Published models' layouts, built by transformers with random weights in small widths: which files, which settings."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
LETTERS = (*SPECIAL, "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
LOWER = (*SPECIAL, "|", "'", "-", *"abcdefghijklmnopqrstuvwxyz")
BLOG = (*"abcdefghijklmnopqrstuvwxyzäöüß", "|", "[UNK]", "[PAD]")
"""As of Hugging Face's fine-tuning tutorial, which many have followed: space and blank at the end."""
PHONEMES = (*SPECIAL, "n", "s", "t", "ə", "aɪ", "ɡ", "iː", "ɚ", "t͡ʃ", "ɜː")  # noqa: RUF001
LANGUAGES = {
    "eng": (*SPECIAL, "|", *"abcdefg"),
    "deu": (*SPECIAL, "|", *"abcdefgäöüß"),
    "rus": (*SPECIAL, "|", "ж", "д"),
}
RATE = 16_000


def audio(seconds: float = 1.3, level: float = 0.05, seed: int = 0) -> np.ndarray:
    """Noise whose colour changes; quiet, so that what is added to its variance shows."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(round(seconds * RATE))
    return (level * np.convolve(noise, [1, 0.7, 0.3], "same") * (1 + np.sin(np.arange(len(noise)) / 2e3))).astype("f4")


def _config(layer: bool, **options):
    return transformers.Wav2Vec2Config(
        feat_extract_norm="layer" if layer else "group", do_stable_layer_norm=layer, conv_bias=layer, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[16] * 7, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, num_codevectors_per_group=8, codevector_dim=16, proj_codevector_dim=24,
        **options,
    )  # fmt: skip


def _model(kind, config, silent=()):
    """Weights far from their initial values; of labels that a trained model never says, none is said."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if silent:
            model.lm_head.bias[list(silent)] = -20.0
            model.lm_head.weight.mul_(2.0)  # so that labels change often
    return model


def _json(folder: Path, **files) -> None:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values, ensure_ascii=False))


def _extractor(folder: Path, mask: bool) -> None:
    _json(folder, preprocessor_config={
        "do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
        "padding_side": "right", "padding_value": 0.0, "return_attention_mask": mask, "sampling_rate": RATE,
    })  # fmt: skip


def _binary(folder: Path, model) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _special(blank="<pad>", unknown="<unk>"):
    return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown, "pad_token": blank}


def base(folder: Path) -> None:
    """facebook/wav2vec2-base: for pretraining, as a pickle."""
    _binary(folder, _model("Wav2Vec2ForPreTraining", _config(False)))
    _extractor(folder, False)


def large(folder: Path) -> None:
    """facebook/wav2vec2-large-lv60."""
    _model("Wav2Vec2ForPreTraining", _config(True)).save_pretrained(folder)
    _extractor(folder, True)


def xls_r(folder: Path) -> None:
    """facebook/wav2vec2-xls-r-300m: a pickle in parts."""
    model = _model("Wav2Vec2ForPreTraining", _config(True))
    model.config.save_pretrained(folder)
    state, names = model.state_dict(), list(model.state_dict())
    parts = {"pytorch_model-00001-of-00002.bin": names[:30], "pytorch_model-00002-of-00002.bin": names[30:]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    _extractor(folder, True)


def base_960h(folder: Path) -> None:
    """facebook/wav2vec2-base-960h: both kinds of weights, and other frameworks'."""
    model = _model("Wav2Vec2ForCTC", _config(False, vocab_size=len(LETTERS)), (1, 2, 3))
    model.save_pretrained(folder)
    _binary(folder, model)
    (folder / "tf_model.h5").write_bytes(b"not for us")
    _extractor(folder, False)
    settings = {**_special(), "do_lower_case": False, "word_delimiter_token": "|", "do_normalize": True}
    _json(
        folder,
        vocab={label: i for i, label in enumerate(LETTERS)},
        tokenizer_config={**settings, "tokenizer_class": "Wav2Vec2CTCTokenizer"},
        special_tokens_map=_special(),
    )


def xlsr_english(folder: Path) -> None:
    """jonatasgrosman/wav2vec2-large-xlsr-53-english: lower case, a language model beside, no tokenizer_config."""
    _model("Wav2Vec2ForCTC", _config(True, vocab_size=len(LOWER)), (1, 2, 3)).save_pretrained(folder)
    _extractor(folder, True)
    _json(folder, vocab={label: i for i, label in enumerate(LOWER)}, special_tokens_map=_special())
    (folder / "language_model").mkdir()
    (folder / "language_model" / "unigrams.txt").write_text("a\nb\n")


def xlsr_german(folder: Path) -> None:
    """As of the tutorial: blank last, tokens added without outputs; the processor's one file of transformers 5."""
    blank = BLOG.index("[PAD]")
    config = _config(True, vocab_size=len(BLOG), pad_token_id=blank)
    _model("Wav2Vec2ForCTC", config, (BLOG.index("[UNK]"),)).save_pretrained(folder)
    special = _special("[PAD]", "[UNK]")
    _json(
        folder,
        vocab={label: i for i, label in enumerate(BLOG)},
        added_tokens={"<s>": len(BLOG), "</s>": len(BLOG) + 1},
        special_tokens_map=special,
        tokenizer_config={**special, "do_lower_case": False, "word_delimiter_token": "|"},
        processor_config={
            "processor_class": "Wav2Vec2Processor",
            "feature_extractor": {
                "do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
                "padding_side": "right", "padding_value": 0.0, "return_attention_mask": True, "sampling_rate": RATE,
            },
        },
    )  # fmt: skip


def phonemes(folder: Path) -> None:
    """facebook/wav2vec2-lv-60-espeak-cv-ft."""
    model = _model("Wav2Vec2ForCTC", _config(True, vocab_size=len(PHONEMES)), (1, 2, 3))
    _binary(folder, model)
    _extractor(folder, True)
    _json(
        folder,
        vocab={label: i for i, label in enumerate(PHONEMES)},
        special_tokens_map=_special(),
        tokenizer_config={
            **_special(), "tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer", "do_phonemize": False,
            "phone_delimiter_token": " ", "word_delimiter_token": None, "phonemizer_lang": "en-us",
        },
    )  # fmt: skip


def mms(folder: Path) -> None:
    """facebook/mms-1b-all: the weights are English's, other languages' adapters lie beside them."""
    from safetensors.torch import save_file

    config = _config(True, vocab_size=len(LANGUAGES["eng"]), adapter_attn_dim=6)
    _model("Wav2Vec2ForCTC", config, (1, 2, 3)).save_pretrained(folder)
    for language, labels in LANGUAGES.items():
        config.vocab_size = len(labels)
        other = _model("Wav2Vec2ForCTC", config, (1, 2, 3))
        state = {n: t for n, t in other.state_dict().items() if "adapter_layer" in n or n.startswith("lm_head")}
        if language != "eng":
            state = {n: t + 0.2 * torch.randn_like(t) if "adapter" in n else t for n, t in state.items()}
        save_file(state, folder / f"adapter.{language}.safetensors", metadata={"format": "pt"})
    _extractor(folder, True)
    _json(
        folder,
        vocab={language: {label: i for i, label in enumerate(labels)} for language, labels in LANGUAGES.items()},
        special_tokens_map=_special(),
        tokenizer_config={
            **_special(), "tokenizer_class": "Wav2Vec2CTCTokenizer", "target_lang": "eng", "word_delimiter_token": "|",
        },
    )  # fmt: skip


NAMES = {
    "facebook/wav2vec2-base": base,
    "facebook/wav2vec2-large-lv60": large,
    "facebook/wav2vec2-xls-r-300m": xls_r,
    "facebook/wav2vec2-base-960h": base_960h,
    "jonatasgrosman/wav2vec2-large-xlsr-53-english": xlsr_english,
    "someone/wav2vec2-xls-r-german": xlsr_german,
    "facebook/wav2vec2-lv-60-espeak-cv-ft": phonemes,
    "facebook/mms-1b-all": mms,
}
CTC = [name for name, build in NAMES.items() if build not in (base, large, xls_r)]


def build_all(root: Path) -> None:
    """A folder ``OWNER/NAME/main`` of each."""
    for name, build in NAMES.items():
        folder = root / name / "main"
        folder.mkdir(parents=True)
        build(folder)
