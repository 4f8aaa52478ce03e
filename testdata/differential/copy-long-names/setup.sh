n=$(printf '%0200d' 7); mkdir -p "d/$n/$n"; echo deep > "d/$n/$n/f"; ln -s "$n/$n/f" d/link; ln "d/$n/$n/f" "d/$n/hard"
