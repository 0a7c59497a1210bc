"""tf.data's side of the input pipeline: the fused decode_and_crop_jpeg, as in big_vision."""

import math
import os

from serve import reader, serve


def prepare(kind, task):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    size = task["image_size"]

    def load(path):
        data = tf.io.read_file(path)
        shape = tf.image.extract_jpeg_shape(data)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.zeros((0, 0, 4), tf.float32), area_range=task["area"],
            aspect_ratio_range=task["aspect"], min_object_covered=0,
            use_image_if_no_bounding_boxes=True)
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, size)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8), 0

    data = tf.data.Dataset.from_tensor_slices(task["paths"]).shuffle(len(task["paths"])).repeat()
    data = data.map(load, num_parallel_calls=task["workers"], deterministic=False)
    data = data.batch(task["batch_size"], drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = task["workers"]
    stream = data.with_options(options).as_numpy_iterator()

    # Two batches are prefetched, one is being filled, and every worker may hold an image.
    ahead = 3 + math.ceil(task["workers"] / task["batch_size"])
    return reader(stream, ahead), {"library": f"tensorflow {tf.__version__}"}


if __name__ == "__main__":
    serve(prepare)
