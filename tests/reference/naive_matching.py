"""The losses of attention and distribution matching as in the papers, value by value in Python floats.

Feature maps are nested as [image][channel][row][column], embeddings as [image][dimension]; `labels` are the
class numbers of the images.
"""

import math


def attention_map(maps, p):
    """[image][position]: sum over channels of |f|^p, row by row, divided by its Euclidean norm."""
    result = []
    for image in maps:
        height, width = len(image[0]), len(image[0][0])
        energy = [
            sum(abs(channel[i][j]) ** p for channel in image) for i in range(height) for j in range(width)
        ]
        norm = math.sqrt(sum(value * value for value in energy))
        result.append([value / norm if norm > 0 else 0.0 for value in energy])
    return result


def class_mean(rows, labels, number):
    """The mean of the rows of one class."""
    mine = [row for row, label in zip(rows, labels, strict=True) if label == number]
    return [sum(column) / len(mine) for column in zip(*mine, strict=True)]


def squared_distance(a, b):
    return sum((u - v) ** 2 for u, v in zip(a, b, strict=True))


def mean_distance(real, real_labels, synthetic, synthetic_labels, classes):
    """Sum over classes of the squared distance between class means: DM's loss, and each layer of SAM."""
    total = 0.0
    for number in range(classes):
        target = class_mean(real, real_labels, number)
        total += squared_distance(target, class_mean(synthetic, synthetic_labels, number))
    return total


def spatial_attention_matching(real, real_labels, synthetic, synthetic_labels, classes, p):
    """Sum over layers of the distance of mean attention maps; `real` and `synthetic` are lists of layers."""
    total = 0.0
    for ours, theirs in zip(real, synthetic, strict=True):
        pair = attention_map(ours, p), attention_map(theirs, p)
        total += mean_distance(pair[0], real_labels, pair[1], synthetic_labels, classes)
    return total
