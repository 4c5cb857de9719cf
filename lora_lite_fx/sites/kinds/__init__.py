"""The kinds of sites: linear, embedding, convolution, experts."""
