"""The selective scan: one public function, its backends and the choice among them.

Letters: b batch, l length, d dim (channels), n d_state.
"""
