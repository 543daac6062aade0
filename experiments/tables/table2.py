"""Table 2: bits/dim of images, without augmentation, of the largest models.

    CIFAR-10     configs/cifar10.py     128 layers, an accelerator of 16 GB
    ImageNet-64  configs/imagenet64.py  30 layers, 4 accelerators of 16 GB

The paper quotes, on CIFAR-10 and ImageNet-64: PixelCNN 3.03 and 3.57, PixelCNN++ 2.92, Image Transformer 2.90,
PixelSNAIL 2.85, Sparse Transformer 2.80 and 3.44; on ImageNet-64 alone: Parallel Multiscale 3.70, Glow 3.81, SPN 3.52,
Axial 3.44, Routing 3.43.
"""

from experiments.harness import runner
from experiments.harness.row import Row

ROWS = (
    Row(
        model='Combiner-Axial',
        column='CIFAR-10',
        config='configs/cifar10.py',
        argument='attention=combiner_axial_rowmajor,layers=128,architecture=sparse_transformer',
        metric='bits_per_dim',
        published=2.77,
    ),
    Row(
        model='Combiner-Axial',
        column='ImageNet-64',
        config='configs/imagenet64.py',
        argument='attention=combiner_axial_rowmajor,layers=30',
        metric='bits_per_dim',
        published=3.42,
    ),
)

if __name__ == '__main__':
    runner.command(ROWS, 'table2')
