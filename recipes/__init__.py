"""Complete recipes on top of the public names of ssmgen: data, training, sampling and evaluation of a paper."""
