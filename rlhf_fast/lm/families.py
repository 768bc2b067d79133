"""The classes of transformers that hold a family's language models, and its models with a `score` head.

A checkpoint with more than a text model (a vision tower, say) is loaded as the class that it names, so that all of it
is there to be saved. Families without a classifier in transformers get one here: the trunk of their language model,
as transformers' own classifiers have it, under a `score` head.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_fast.lm.private import GenericForSequenceClassification, rename_as
from rlhf_fast.lm.trust import own_class

_CLASSIFIER = "ForSequenceClassification"


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether the config names a sequence classifier."""
    return any(name.endswith(_CLASSIFIER) for name in config.architectures or [])


def language_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the language models of this config.

    Where the config has parts beside a text model, it is the class that has these parts too. Trusted code beside the
    weights comes first. Raises ValueError for a
    family without such a class.
    """
    if (own := own_class(config, "AutoModelForCausalLM")) is not None:
        return own
    named = _named(config) if config.sub_configs else []
    for found in _generative(config, named):
        if found.config_class is type(config) or (found in named and reads(found, config) is not config):
            return found
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is None:
        raise ValueError(f"expected a family with a class for language models in transformers, got {config.model_type}")
    return causal


def reads(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that `model_class` is made of: the text model's for a class of text, else all of it."""
    text = config.get_text_config()
    return text if model_class.config_class is type(text) else config


def scorer_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the models of this config with a `score` head.

    A config that names a classifier of transformers gets that classifier, whatever its head. Raises ValueError as
    `language_class`.
    """
    if is_classifier(config) and (written := own_class(config, "AutoModelForSequenceClassification")) is not None:
        return written
    own: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if own is not None and (own in _named(config) or (not is_classifier(config) and _scores(own, config))):
        return own
    language = language_class(config)
    text = config.get_text_config()
    if _trunk_name(language) is None and text is not config:  # Llama 4: no module has the states before the head
        language = language_class(text)
    return _scorer_of(language)


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a language model that a model of `scorer_class` has too: all of it but the head."""
    name = _trunk_name(type(model))
    return trunk_of(model.language_model) if name is None else getattr(model, name)  # pyright: ignore[reportArgumentType]


def _named(config: PreTrainedConfig) -> list[Any]:
    """The classes of transformers that the config names."""
    return [found for name in config.architectures or [] if (found := getattr(transformers, name, None)) is not None]


def _generative(config: PreTrainedConfig, named: list[Any]) -> Iterator[type[PreTrainedModel]]:
    """The generative decoders among `named` and the classes of the config's family."""
    mappings = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
    if config.is_encoder_decoder:  # its decoder alone is a language model
        mappings = mappings[:1]
    for found in (*named, *(mapping.get(type(config), None) for mapping in mappings)):
        if inspect.isclass(found) and issubclass(found, PreTrainedModel) and found.can_generate():
            yield found


def _scores(classifier: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether `classifier` is of this very config and names its head `score`."""
    made: Any = inspect.unwrap(classifier.__init__)
    return classifier.config_class is type(config) and "score" in made.__code__.co_names


def _trunk_name(language: type[PreTrainedModel]) -> str | None:
    """The attribute that holds the trunk. For most classes it is the prefix; Llama 4 has a prefix without a trunk."""
    made: Any = inspect.unwrap(language.__init__)
    return next((name for name in (language.base_model_prefix, "model") if name in made.__code__.co_names), None)


@functools.cache
def _scorer_of(language: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A classifier on the trunk of `language`, with the names of weights that `language` has."""
    family: Any = next(base for base in language.__mro__ if PreTrainedModel in base.__bases__)
    name = _trunk_name(language)
    if name is None:
        raise ValueError(f"expected a language model with a trunk to put a score head on, got {language.__name__}")

    def init(self: Any, config: Any) -> None:
        family.__init__(self, config)
        self.num_labels = config.num_labels
        setattr(self, name, getattr(language(config), name))
        self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=False)
        self.post_init()

    stem = family.__name__.removesuffix("PreTrainedModel")
    taken = hasattr(transformers, stem + _CLASSIFIER)  # for another config, or with another head
    parts = {"__init__": init, "config_class": language.config_class, "base_model_prefix": name}
    # With the module of the family, because transformers renames the weights of its own classes alone.
    parts["__module__"] = family.__module__
    title = f"{stem}Score{_CLASSIFIER}" if taken else stem + _CLASSIFIER
    rename_as(language.__name__, title)
    made: Any = type(title, (GenericForSequenceClassification, family), parts)
    return made
