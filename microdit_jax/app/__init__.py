"""A web page to draw with: what may be asked, a studio that draws one request after another, HTTP.

Not Gradio: its newest release (6.31) refuses Pillow 13, which everything here is tested with, it
would bring some twenty packages for one form, and its file routes take paths from the page. Here a
request is six checked values, and a picture's address is a random name.
"""
