"""Talk to what you trained: python chat.py --path output/step3-models/1.3b   (see inference/chatbot.py)"""

import sys

from inference.chatbot import main

if __name__ == "__main__":
    sys.exit(main())
