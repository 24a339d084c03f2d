"""Several processes, each with a graphics card of its own, make one video together.

Each of them runs the whole program with all weights. In the sampler they share the work: every process takes one of the
two prompts, or a part of the video's tokens, or both; all of them get the whole answer and go on with equal numbers.
"""
