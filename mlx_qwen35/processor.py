class Processor:
    pass
