"""Data of the tests of RobustContrastiveLoss."""

import contrastive

from tempnet_kernels.nn import ContrastiveTempNet, RobustContrastiveLoss

B, D, SAMPLES = 12, 16, 40


def features(b=B):
    return contrastive.features(b, D)


def make(method="tempnet", samples=SAMPLES, rho=1.0, **options):
    if method == "tempnet":
        for i, side in enumerate(("image", "text")):
            options.setdefault(f"{side}_temp_gen", ContrastiveTempNet(D, num_prototypes=8, seed=i))
    return RobustContrastiveLoss(samples, rho=rho, method=method, **options)
