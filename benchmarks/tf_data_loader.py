"""The same training images by tf.data, with TensorFlow's operations alone.

Run by TensorFlow's Python, 2.21.0 for instance; talks as `timm_loader.py` does. Decode
and crop are one operation; resizing is without a wider filter, as TensorFlow's recipes
have it; the 15 operations of RandAugment and their levels are timm's, written for this
comparison (TensorFlow has none; Keras's took 60 ms an image).
"""

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf

tf.config.threading.set_intra_op_parallelism_threads(1)
SIZE = 224
FILL = (124, 116, 104)
LEVEL, DEVIATION, PROBABILITY = 9.0, 0.5, 0.5


VALUES = tf.range(256, dtype=tf.int32)


def byte(x):
    return tf.cast(tf.clip_by_value(x, 0, 255), tf.uint8)


def blend(one, other, factor):
    one, other = tf.cast(one, tf.float32), tf.cast(other, tf.float32)
    return byte(one + factor * (other - one))


def by_table(image, table):
    return tf.gather(byte(table), tf.cast(image, tf.int32))


def affine(image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    # A fourth channel tells what came from outside.
    ones = tf.ones_like(image[..., :1])
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.concat([image, ones], -1)[None],
        transforms=[tf.stack([a, b, c, d, e, f, 0.0, 0.0])],
        output_shape=(SIZE, SIZE),
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
        fill_value=0.0,
    )[0]
    return tf.where(moved[..., 3:] > 0, moved[..., :3], tf.constant(FILL, tf.uint8))


def auto_contrast(image, *_):
    pixels = tf.cast(image, tf.float32)
    low, high = tf.reduce_min(pixels, (0, 1)), tf.reduce_max(pixels, (0, 1))
    return byte((pixels - low) * 255 / tf.maximum(high - low, 1))


def equalize(image, *_):
    def channel(x):
        histogram = tf.math.bincount(tf.cast(x, tf.int32), minlength=256)
        last = histogram[tf.reduce_max(tf.cast(x, tf.int32))]
        step = (tf.reduce_sum(histogram) - last) // 255
        table = (tf.cumsum(histogram, exclusive=True) + step // 2) // tf.maximum(
            step, 1
        )
        return tf.where(step > 0, by_table(x, table), x)

    return tf.stack([channel(image[..., i]) for i in range(3)], -1)


def posterize(image, level, _):
    step = tf.bitwise.left_shift(16, tf.cast(level * 0.4, tf.int32))
    return by_table(image, VALUES // step * step)


def rotate(image, level, sign):
    angle, half = sign * level * 3 / 180 * 3.14159265, (SIZE - 1) / 2
    cos, sin = tf.cos(angle), tf.sin(angle)
    c, f = half - cos * half + sin * half, half - sin * half - cos * half
    return affine(image, cos, -sin, c, sin, cos, f)


def contrast(image, factor):
    grey = tf.cast(tf.image.rgb_to_grayscale(image), tf.float32)
    return blend(
        tf.fill(tf.shape(image), tf.round(tf.reduce_mean(grey))), image, factor
    )


def sharpness(image, factor):
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32) / 13
    pixels = tf.cast(image, tf.float32)[None]
    kernel = tf.tile(kernel[..., None, None], (1, 1, 3, 1))
    smooth = tf.nn.depthwise_conv2d(pixels, kernel, (1, 1, 1, 1), "SAME")[0]
    return blend(smooth, image, factor)


def enhancement(apply):
    return lambda image, level, sign: apply(
        image, tf.maximum(0.1, 1 + sign * level * 0.09)
    )


OPERATIONS = (
    auto_contrast,
    equalize,
    lambda image, *_: 255 - image,
    rotate,
    posterize,
    lambda image, level, _: by_table(
        image,
        tf.where(
            tf.cast(VALUES, tf.float32) >= 256 - level * 25.6, 255 - VALUES, VALUES
        ),
    ),
    lambda image, level, _: by_table(
        image, tf.where(VALUES < 128, VALUES + tf.cast(level * 11, tf.int32), VALUES)
    ),
    enhancement(
        lambda image, factor: blend(
            tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)), image, factor
        )
    ),
    enhancement(contrast),
    enhancement(lambda image, factor: blend(tf.zeros_like(image), image, factor)),
    enhancement(sharpness),
    lambda image, level, sign: affine(image, b=sign * level * 0.03),
    lambda image, level, sign: affine(image, d=sign * level * 0.03),
    lambda image, level, sign: affine(image, c=sign * level * 0.045 * SIZE),
    lambda image, level, sign: affine(image, f=sign * level * 0.045 * SIZE),
)


def rand_augment(image):
    for _ in range(2):
        level = tf.clip_by_value(tf.random.normal((), LEVEL, DEVIATION), 0, 10)
        sign = tf.where(tf.random.uniform(()) < 0.5, 1.0, -1.0)
        index = tf.random.uniform((), 0, len(OPERATIONS), tf.int32)
        index = tf.where(tf.random.uniform(()) < PROBABILITY, index, len(OPERATIONS))
        before = image
        branches = [
            lambda op=op, x=before, m=level, s=sign: op(x, m, s) for op in OPERATIONS
        ]
        image = tf.switch_case(index, [*branches, lambda x=before: x])
        image.set_shape((SIZE, SIZE, 3))
    return image


def prepare(path):
    encoded = tf.io.read_file(path)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(encoded),
        tf.zeros((1, 0, 4)),
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)[None]
    shape = (SIZE, SIZE)
    image = tf.cond(
        tf.random.uniform(()) < 0.5,
        lambda: tf.image.resize(image, shape, "bilinear"),
        lambda: tf.image.resize(image, shape, "bicubic"),
    )
    image = tf.image.random_flip_left_right(byte(tf.round(image[0])))
    return rand_augment(image)


def main(root, batch_size, workers):
    files = tf.data.Dataset.list_files(f"{root}/*/*.JPEG", shuffle=False)
    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1
    batches = iter(
        files.cache()
        .shuffle(1000, reshuffle_each_iteration=True)
        .repeat()
        .map(prepare, num_parallel_calls=workers, deterministic=True)
        .batch(batch_size, drop_remainder=True)
        .prefetch(2)
        .with_options(options)
    )
    for line in sys.stdin:
        for _ in range(int(line)):
            next(batches)
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
