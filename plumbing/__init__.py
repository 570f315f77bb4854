"""What a long run on a shared machine needs and the paper does not speak of.

Here belongs what keeps a run alive or brings material to it: settings, checkpoints and locks,
several processes, the files of models and problems. Nothing here knows the method, and no file here
imports train.py, evaluate.py or rollout.py.
"""
