"""How sure we are: what stands between graded answers and a sentence that they allow.

Here belong the answers on disk, measures of style, a judge, intervals, tables and figures. No file
here imports train.py, evaluate.py or rollout.py as it is loaded.
"""
