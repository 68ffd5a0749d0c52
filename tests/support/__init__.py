"""What tests share: tiny models, scripted models, engines of both."""
