from persona_pruner.cli import main

main()
