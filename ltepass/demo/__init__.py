"""`ltepass demo`: a real model is trained, lowered, timed, saved and loaded, and one table says what came out."""
