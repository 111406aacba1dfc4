"""A page on this machine to play with task vectors: `vtv demo`, or

>>> launch(make_page(Player.load("tiny")))

`playing` is what is computed, without a browser; `page` is what is shown and `callbacks` what its events call, and both
need gradio.
"""
