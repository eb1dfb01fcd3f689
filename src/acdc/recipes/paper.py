"""The recipes of the AC/DC paper, from its published configurations.

The numbers are from IST-DASLab/ACDC, commit ac53210: phases, learning rates, weight decay 2^-15 on
every parameter, layers that stay dense. ``--set`` gives the other published sparsities, for example
``--set method.pattern.sparsity=0.95``. A configuration with other phases or other layers is another
recipe, named after the difference. ``--set dense_finetune=true`` gives the paper's dense twins.

Three things differ from the published runs:

* Sparsity is exact. In the published runs it is off by one weight, and by more if weights tie.
* All recipes compute in float32 on one device. The ImageNet scripts used float16 on four GPUs. On
  CUDA, ``--set precision=16-mixed --set devices=4`` is the same arithmetic for the same batch of
  256; BatchNorm then sees 64 images at a time, as in the published runs.
* 2:4 groups never cross an output channel. The first convolution has 3 input channels, which do not
  divide into groups of four, and stays dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from acdc.layers import Layers
from acdc.methods.acdc import ACDC
from acdc.pattern import NM, Pattern, Unstructured
from acdc.runs.data import Augment, Cifar10, Cifar100, ImageNet
from acdc.runs.models import CifarResNet, MobileNetV1, Model, ResNet50, WideResNet
from acdc.runs.optim import SGD, Cosine, StepDecay
from acdc.runs.recipe import Recipe
from acdc.schedule import Alternate, alternate

# --- phases -------------------------------------------------------------------------------------


def _imagenet_phases(epochs: int) -> Alternate:
    """Phases of 5 epochs; 10 in the last dense one, 15 in the last sparse one."""
    return alternate(
        epochs=epochs,
        warmup="10ep",
        sparse="5ep",
        dense="5ep",
        last_dense="10ep",
        last_sparse="15ep",
    )


def _freq20() -> Alternate:
    """Phases of 20 epochs; 30 in the last sparse one."""
    return alternate(epochs=200, warmup="10ep", sparse="20ep", dense="20ep", last_sparse="30ep")


def _dense13() -> Alternate:
    """20 sparse epochs, 13 dense ones; 50 in the last sparse phase."""
    return alternate(epochs=225, warmup="10ep", sparse="20ep", dense="13ep", last_sparse="50ep")


# --- CIFAR --------------------------------------------------------------------------------------


def cifar10_resnet20() -> Recipe:
    """ResNet-20 on CIFAR-10. The two 1x1 convolutions between the stages stay dense."""
    return Recipe(
        name="cifar10_resnet20",
        about="CIFAR-10 with ResNet-20, 90 %, both 1x1 shortcuts dense, 200 epochs",
        model=CifarResNet(depth=20),
        data=Cifar10(),
        method=ACDC(Unstructured(0.9), _freq20(), layers=Layers(exclude=("*.downsample.*",))),
        optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr=StepDecay(at=(65, 125, 185), gamma=0.1),
        batch_size=128,
        checkpoint_steps=391,
    )


def cifar10_resnet20_s50() -> Recipe:
    """ResNet-20 on CIFAR-10 at 50 %, the one sparsity at which all 22 layers were pruned."""
    recipe = cifar10_resnet20()
    return replace(
        recipe,
        name="cifar10_resnet20_s50",
        about="the same at 50 %, where all 22 layers are pruned",
        method=ACDC(Unstructured(0.5), recipe.method.schedule),
    )


def cifar10_memorisation() -> Recipe:
    """ResNet-20 on CIFAR-10 with 1,000 random labels and no augmentation. 50, 75, 90 and 95 %."""
    recipe = cifar10_resnet20()
    return replace(
        recipe,
        name="cifar10_memorisation",
        about="the same at 90 % with 1,000 random labels and no augmentation",
        data=Cifar10(augment=Augment(), random_labels=1000),
    )


def _wrn28_10(suffix: str, about: str, phases: Alternate) -> Recipe:
    return Recipe(
        name=f"cifar100_wrn28_10{suffix}",
        about=about,
        model=WideResNet(depth=28, widen=10, dropout=0.3),
        data=Cifar100(),
        method=ACDC(Unstructured(0.9), phases),
        optimizer=SGD(lr=0.08, momentum=0.9, weight_decay=5e-4, nesterov=True),
        lr=StepDecay(at=(75, 115, 155), gamma=0.1),
        batch_size=128,
        checkpoint_steps=391,
    )


def cifar100_wrn28_10() -> Recipe:
    """WideResNet-28-10 on CIFAR-100, phases of 20 epochs. Published at 50, 75, 90 and 95 %."""
    return _wrn28_10(
        "", "CIFAR-100 with WideResNet-28-10, 90 %, phases of 20 epochs, 200 epochs", _freq20()
    )


def cifar100_wrn28_10_dense13() -> Recipe:
    """The same with shorter dense phases and a longer last sparse one."""
    return _wrn28_10("_dense13", "the same, dense phases of 13 epochs, 225 epochs", _dense13())


# --- ImageNet -----------------------------------------------------------------------------------


def _imagenet(
    name: str, about: str, model: Model, pattern: Pattern, epochs: int, layers: Layers | None
) -> Recipe:
    """Return an ImageNet recipe."""
    return Recipe(
        name=name,
        about=about,
        model=model,
        data=ImageNet(),
        method=ACDC(pattern, _imagenet_phases(epochs), layers=layers),
        optimizer=SGD(lr=0.256, momentum=0.875, weight_decay=2**-15),
        lr=Cosine(warmup=5, every="epoch"),
        batch_size=256,
        eval_batch_size=256,
        checkpoint_steps=1000,
    )


def _resnet50(
    suffix: str,
    about: str,
    pattern: Pattern | None = None,
    epochs: int = 100,
    layers: Layers | None = None,
) -> Recipe:
    return _imagenet(
        f"imagenet_resnet50{suffix}",
        about,
        ResNet50(),
        pattern or Unstructured(0.9),
        epochs,
        layers,
    )


def imagenet_resnet50() -> Recipe:
    """ResNet-50 v1.5 on ImageNet: global magnitude over all 54 layers. Published at 50 to 98 %."""
    return _resnet50("", "ImageNet with ResNet-50, 90 % over all 54 layers, 100 epochs")


def imagenet_resnet50_150ep() -> Recipe:
    """The same over 150 epochs. Published at 90 %."""
    return _resnet50("_150ep", "the same over 150 epochs", epochs=150)


def imagenet_resnet50_200ep() -> Recipe:
    """The same over 200 epochs. Published at 90 %, for its dense twin."""
    return _resnet50("_200ep", "the same over 200 epochs", epochs=200)


def imagenet_resnet50_no_conv1_fc() -> Recipe:
    """Global magnitude with the first convolution and the last layer dense. 80 to 98 %."""
    return _resnet50(
        "_no_conv1_fc",
        "ImageNet with ResNet-50, 90 %, conv1 and fc dense, 100 epochs",
        layers=Layers(exclude=("conv1", "fc")),
    )


def imagenet_resnet50_uniform() -> Recipe:
    """The same sparsity in every layer but the first and the last. Published at 90 and 95 %."""
    return _resnet50(
        "_uniform",
        "ImageNet with ResNet-50, 90 % in every layer but conv1 and fc, 100 epochs",
        pattern=Unstructured(0.9, scope="uniform"),
    )


def imagenet_resnet50_uniform_200ep() -> Recipe:
    """Uniform sparsity over 200 epochs. Published at 90 and 95 %."""
    return _resnet50(
        "_uniform_200ep",
        "the same over 200 epochs",
        pattern=Unstructured(0.9, scope="uniform"),
        epochs=200,
    )


def imagenet_resnet50_nm24() -> Recipe:
    """2:4 sparsity in every layer that divides into groups of four: all but the first."""
    return _resnet50(
        "_nm24", "ImageNet with ResNet-50, two of every four weights, 100 epochs", pattern=NM(2, 4)
    )


def imagenet_mobilenetv1() -> Recipe:
    """MobileNetV1 on ImageNet, depthwise convolutions pruned too. Published at 75 and 90 %."""
    return _imagenet(
        "imagenet_mobilenetv1",
        "ImageNet with MobileNetV1, 90 % over all 28 layers, 100 epochs",
        MobileNetV1(),
        Unstructured(0.9),
        100,
        None,
    )


def imagenet_mobilenetv1_no_conv1_dw() -> Recipe:
    """MobileNetV1 with the first and all depthwise convolutions dense: 14 layers pruned."""
    return _imagenet(
        "imagenet_mobilenetv1_no_conv1_dw",
        "ImageNet with MobileNetV1, 90 %, conv1 and depthwise layers dense, 100 epochs",
        MobileNetV1(),
        Unstructured(0.9),
        100,
        Layers(exclude=("conv1", "*.depthwise")),
    )


RECIPES: tuple[Callable[[], Recipe], ...] = (
    cifar10_resnet20,
    cifar10_resnet20_s50,
    cifar10_memorisation,
    cifar100_wrn28_10,
    cifar100_wrn28_10_dense13,
    imagenet_resnet50,
    imagenet_resnet50_150ep,
    imagenet_resnet50_200ep,
    imagenet_resnet50_no_conv1_fc,
    imagenet_resnet50_uniform,
    imagenet_resnet50_uniform_200ep,
    imagenet_resnet50_nm24,
    imagenet_mobilenetv1,
    imagenet_mobilenetv1_no_conv1_dw,
)
