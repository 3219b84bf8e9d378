"""Makes the model that a config describes, and checks that it can be trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.fields import read
from flexmoe_jax import models
from flexmoe_jax.errors import InputError
from flexmoe_jax.options import ModelOptions
from flexmoe_jax.tasks import Batch, Task
from flexmoe_jax.types import Array, PyTree

# Backbones that take images alone; mlp takes numbers of any shape.
_OF_IMAGES = ("convnet", "cnn", "resnet")


def finished(
    make_model: Callable[[int], models.Model],
    config: ConfigDict,
    classes: int,
    prepare: Callable[[Array], Array],
) -> models.Model:
    """Makes the model for `classes` classes, in the config's precision, applied after `prepare`."""
    return make_model(classes).computed_in(config.model.dtype).after(prepare)


def model_maker(config: ConfigDict) -> Callable[[int], models.Model]:
    """Checks the model's fields, and returns a function: number of classes -> model."""
    options = read(ModelOptions, config)
    if options.whole_experts:
        if options.router:
            remedy = "whole models have no gate that a router could learn from: give false"
            raise InputError("model.router", options.router, remedy)
        inside = config.copy_and_resolve_references()
        inside.model.update(experts=1, whole_experts=False)
        make_inside = model_maker(inside)
        dtype = options.dtype  # Inside, since whole models of tokens have nothing else to cast.
        return lambda classes: models.clustered(
            make_inside(classes).computed_in(dtype), options.experts
        )
    if options.backbone == "transformer":
        _refuse_parts_of_images(options)
        return lambda classes: _decoder(options, config.data.length)
    if options.backbone == "resnet":
        _require_one_width(options)
    backbone = models.make_backbone(
        options.backbone,
        widths=options.widths or (),
        depth=options.depth,
        groups=options.groups,
        conv=models.convolution(options.conv),
    )
    if options.local_backbone:
        backbone = models.PersonalMixture(backbone, backbone.clone())
    if options.moe_stages:
        return partial(_within, _with_stages(backbone, options))
    return partial(_classifier, options, backbone)


def _refuse_parts_of_images(options: ModelOptions) -> None:
    """Refuses fields that a decoder does not have."""
    for field in ("local_backbone", "moe_stages"):
        if value := getattr(options, field):
            raise InputError(f"model.{field}", value, "transformer has none: leave it out")
    _require_one_width(options)


def _require_one_width(options: ModelOptions) -> None:
    widths = options.widths or ()
    if len(widths) > 1:
        remedy = f"{options.backbone} has one width: give one number, as (64,)"
        raise InputError("model.widths", tuple(widths), remedy)


def _with_stages(backbone: nn.Module, options: ModelOptions) -> nn.Module:
    """Adds a MoE layer after some stages of a ResNet."""
    stages = [part.strip() for part in options.moe_stages.split(",")]
    if not isinstance(backbone, models.ResNet) or not set(stages) <= {"1", "2", "3"}:
        remedy = "name stages of resnet, as 1,2,3; empty for experts after any backbone"
        raise InputError("model.moe_stages", options.moe_stages, remedy)
    mixture = partial(
        models.MoELayer,
        options.experts,
        options.hidden,
        options.top_k,
        options.shared_experts,
        whole=True,
        with_router=options.router,
    )
    return backbone.clone(mixture=mixture, stages=tuple(map(int, stages)))


def _within(backbone: nn.Module, classes: int) -> models.Model:
    return models.from_linen(models.Classifier(backbone, classes))


def _classifier(options: ModelOptions, backbone: nn.Module, classes: int) -> models.Model:
    module = models.MoEClassifier(
        backbone=backbone,
        classes=classes,
        experts=options.experts,
        hidden=options.hidden,
        top_k=options.top_k,
        shared_experts=options.shared_experts,
        with_router=options.router,
    )
    return models.classifier(module)


def _decoder(options: ModelOptions, length: int) -> models.Model:
    module = models.Transformer(
        experts=options.experts,
        depth=options.depth or models.Transformer.depth,
        width=options.widths[0] if options.widths else models.Transformer.width,
        heads=options.heads,
        hidden=options.hidden,
        every=options.moe_every,
        top_k=options.top_k,
        shared_experts=options.shared_experts,
        router=options.router,
        positions=options.positions,
        length=length,
    )
    return models.decoder(module)


def make_ownership(options: ModelOptions) -> models.Ownership:
    """Decides which parts of the model are averaged, and which stay with their clients."""
    private = tuple(part.strip() for part in options.private.split(",") if part.strip())
    return models.Ownership(private, options.gate == "shared")


def check_model(model: models.Model, task: Task, sample: Batch, name: str) -> None:
    """Rejects a backbone that the rounds cannot train, without computing anything.

    Args:
      model: the model around the backbone.
      task: the learning task.
      sample: two examples.
      name: name of the backbone.

    Raises:
      InputError: naming the part that does not fit.
    """
    shape = np.shape(sample.get("images", ()))
    if name in _OF_IMAGES and len(shape) != 4:
        remedy = f"an example has shape {shape[1:]}, not (h, w, channels): choose mlp"
        raise InputError("model.backbone", name, remedy)

    def trace(sample: Batch) -> tuple[PyTree, PyTree]:
        # As in the rounds, the outputs depend on the parameters alone.
        inputs = task.inputs(sample)
        params = model.init(jax.random.key(0), inputs)
        features = model.trunk(params, inputs)
        return features, model.head(params, features, {})[0]

    contract = (
        "a backbone maps images (B, h, w, channels) to features (B, D) by its parameters alone, "
        "without batch statistics, other collections or random numbers"
    )
    try:
        features, outputs = jax.eval_shape(trace, sample)
    except Exception as error:  # A backbone that does not fit can fail in any way.
        if isinstance(error, InputError) and error.field != "model":
            raise
        reason = " ".join(str(error).split()).partition(" (https://flax")[0]
        raise InputError("model.backbone", name, f"{reason[:300]}; {contract}") from error
    if "images" in sample and (outputs.ndim != 2 or outputs.shape[0] != len(sample["images"])):
        reason = f"it turns images {sample['images'].shape} into {features.shape}"
        raise InputError("model.backbone", name, f"{reason}; {contract}")
