"""Small networks in PyTorch, with the layers and names of torchvision's and of the authors'.

`python tests/torch_networks.py` (needs PyTorch) makes golden/torch.safetensors: for each network
its state dict, some images and the logits it gives them.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

GOLDEN = Path(__file__).parent / "golden" / "torch.safetensors"
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class LeNet(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        one, two, hidden = (round(width * n) for n in (20, 50, 500))
        self.conv1, self.conv2 = nn.Conv2d(1, one, 5), nn.Conv2d(one, two, 5)
        self.fc1, self.fc2 = nn.Linear(16 * two, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(conv(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class VGG(nn.Module):
    """torchvision's for images of side 224, and the authors' CIFAR network without hidden."""

    def __init__(self, width, norm, hidden, side, classes):
        super().__init__()
        layers, channels = [], 3
        for block in VGG16:
            for features in (round(width * n) for n in block):
                layers.append(nn.Conv2d(channels, features, 3, padding=1))
                layers += [nn.BatchNorm2d(features)] if norm else []
                layers.append(nn.ReLU())
                channels = features
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        sizes = (channels * (side // 32) ** 2, *hidden)
        dense = []
        for inputs, outputs in pairwise(sizes):
            dense += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout()]
        last = nn.Linear(sizes[-1], classes)
        self.classifier = nn.Sequential(*dense, last) if hidden else last

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Block(nn.Module):
    def __init__(self, channels, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride > 1 or channels != features:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self, stages, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stages[0], 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stages[0])
        channels = stages[0]
        for i, features in enumerate(stages):
            blocks = Block(channels, features, 2 if i else 1), Block(features, features, 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            channels = features
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, padding=1)
        for name, stage in self.named_children():
            x = stage(x) if name.startswith("layer") else x
        return self.fc(x.mean((2, 3)))


def make():
    """Name -> (network, images uint8 [B, C, H, W]), all random, in evaluation mode."""
    torch.manual_seed(0)
    networks = {
        "lenet": (LeNet(0.1, 4), (1, 28, 28)),
        "vgg16_bn": (VGG(1 / 32, True, (6, 5), 64, 7), (3, 64, 64)),
        "vgg16": (VGG(1 / 32, False, (6,), 64, 7), (3, 64, 64)),
        "vgg16_cifar": (VGG(1 / 32, True, (), 32, 10), (3, 32, 32)),
        "resnet18": (ResNet((4, 6, 8, 10), 5), (3, 64, 64)),
    }
    made = {}
    for name, (network, shape) in networks.items():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.normal_(layer.bias)
            elif isinstance(layer, nn.BatchNorm2d):
                for each in (layer.weight, layer.running_var):
                    nn.init.uniform_(each, 0.5, 2)
                for each in (layer.bias, layer.running_mean):
                    nn.init.normal_(each)
        made[name] = network.eval(), torch.randint(256, (2, *shape), dtype=torch.uint8)
    return made


if __name__ == "__main__":
    from safetensors.torch import save_file

    arrays = {}
    for name, (network, images) in make().items():
        arrays |= {f"{name}/state/{key}": value for key, value in network.state_dict().items()}
        with torch.no_grad():
            arrays |= {f"{name}/images": images, f"{name}/logits": network(images / 255)}
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(arrays, GOLDEN)
