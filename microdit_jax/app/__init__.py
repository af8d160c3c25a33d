"""A web page to sample with: limits of a request, a studio that runs one after another, HTTP.

Not Gradio: its newest release (6.31) refuses Pillow 13, which everything here is tested with, it
would bring some twenty packages for one form, and its file routes take paths from the page. Here a
request is six checked values, and an image's address is a random name.
"""
