"""Commands that make pages of docs/ from code: figures, the executed notebook, the API's pages."""
