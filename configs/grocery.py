"""Grocery photos: what shortcut-aware training changes on real images and real text.

    mmrm matrix configs/grocery.py --root ../shared/data/grocery

Smartphone photos and product descriptions; in `packages` and `produce` the kind of product described (long texts of
packages, short ones of produce) predicts the label, each the other way round; in `neutral` text alone says nothing. The
same command works on any folder with files of these names; `--env NAME=TRAIN,TEST` names others.

The tower is trained too: the packaged model's has seen nothing but rendered pictures. Learning rate, batch size, weight
decay, tiles, augmentation and freezing were chosen with standard training on the last fifth of each product's photos in
the training files. One seed takes 29 minutes on two cores. Three seeds (`--seeds 3`) gave, in %, with 95 % intervals:

                     i.i.d.              o.o.d.              SFD
    text-only        71.9                40.0                100
    standard         92.4 (91.7-93.1)    88.4 (87.6-89.3)    5.3 (4.0-6.5)
    shortcut-aware   91.8 (90.9-92.6)    87.7 (86.8-88.6)    3.8 (2.4-5.0)
    difference       -0.6 (-1.2-0.0)     -0.7 (-1.2--0.2)    -1.5 (-2.6--0.5)

(intervals over three seeds drawn with equal chance, which are too narrow.) Trained on `packages`, standard training
is right in 93.5 % of its own test, where a bilinear logistic on colour histograms and TF-IDF has 96 %. That is not
for want of training but a change of place and light between training and test photos: of photos held out at random
from the training files it is right in 97.8 %; of those whose surroundings are least like the others', in 93.3 % (such
a bilinear model: 94.6), with 400 steps in 90.7, with 1800 in 92.9, at half the learning rate 91.7, with more cropping
and brightness 92.5 to 92.9, and with drop path 92.2. One seed each: differences of a point mean little.

What is missing is fine: on 733 such held-out comparisons standard training is right in 98.1 % of those between a
package and a piece of produce, and in 83.8 % of those within a group, one in five (95.4 together). A bilinear model,
of the best of three penalties there, on histograms has 97.1 and 91.6, one on the visual tokens of the packaged model,
as it is, 98.5 and 93.0: the tower sees enough, and the decoder learns what tells a juice from another from the fifth
of the comparisons that need it. A frozen tower does not help (94.0; at twice the rate and at a tenth of the decay,
too), nor, with one, a frozen projector (91.8), LoRA of rank 8 (91.4), no augmentation (92.6) or more of it (93.2).

It is not the photos alone: of the photos that it was trained on it tells 91.7 % from texts of their group that no
comparison had put beside them, of held-out ones in a place of their own 83, where a bilinear model on histograms tells
91. It may be (not tested) that four in five comparisons are settled by the group and then teach it no product, where a
bilinear model draws on them for each. With names of products for descriptions it is 81 there: reading is not the gap.
On that split (237 photos held out; within and between groups, mixed as in the file; seeds apart) batches of 16 in 900
steps have 90.6 and 91.2, of 8 in 1800 steps 92.0, 92.3 and 91.6, of 4 in 3600 91.2, and sharpness-aware minimisation in
1800 half steps 92.0. Averaged weights, shifts of colour (90.8), rolled images (90.4), a tower at a fifth of the rate
(91.1) and a longer memory of Adam's (90.8) change nothing; erased parts (86.9) and a head of 8 or 32 times the size at
a lower rate (84.2, 80.7) do harm; the mean of two or four models is 1 to 2 points better within a group.
"""

from pathlib import Path

from mmrm_jax.config import Augmentation, DataConfig, Environment, MatrixConfig, OptimizerConfig, TrainConfig

config = MatrixConfig(
    title="Grocery photos: what shortcut-aware training changes",
    out=Path("runs/grocery"),
    environments=(
        Environment("packages", "train.jsonl", "test.jsonl"),
        Environment("produce", "train_produce.jsonl", "test_ood.jsonl"),
        Environment("neutral", "train_neutral.jsonl", "test_neutral.jsonl"),
    ),
    train=TrainConfig(
        batch_size=16,
        steps=900,
        freeze=(),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=1.0),
        data=DataConfig(
            holdout=0.1, buckets=6, max_tiles=4, join=8, augment=Augmentation(crop=0.5, mirror=True, brightness=0.1)
        ),
    ),
)
