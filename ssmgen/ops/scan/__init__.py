"""The selective scan and its backends. Letters: b batch, l length, d dim (channels), n d_state."""
