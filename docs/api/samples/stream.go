// Run a command and follow it, resuming at the last event whatever breaks.
// Needs URL, KEY, PROJECT; arguments: the command. Exits with the command's exit code.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

type event struct {
	Stream   string `json:"stream"`
	Line     string `json:"line"`
	Partial  bool   `json:"partial"`
	ExitCode *int   `json:"exit_code"`
}

func ask(method, path string, body io.Reader, after string) *http.Response {
	request, err := http.NewRequest(method, os.Getenv("URL")+path, body)
	if err != nil {
		panic(err)
	}
	request.Header.Set("X-API-Key", os.Getenv("KEY"))
	request.Header.Set("Content-Type", "application/json")
	if after != "" {
		request.Header.Set("Last-Event-ID", after)
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return nil
	}
	if answer.StatusCode >= 400 { // coming back would not help
		text, _ := io.ReadAll(answer.Body)
		fmt.Fprintln(os.Stderr, string(text))
		os.Exit(2)
	}
	return answer
}

func submit(command string) string {
	body, _ := json.Marshal(map[string]string{"command": command})
	answer := ask("POST", "/projects/"+os.Getenv("PROJECT")+"/shell", bytes.NewReader(body), "")
	if answer == nil {
		os.Exit(2)
	}
	defer answer.Body.Close()
	var made struct{ Data struct{ ID string } }
	if err := json.NewDecoder(answer.Body).Decode(&made); err != nil {
		panic(err)
	}
	return made.Data.ID
}

func main() {
	command, after := submit(strings.Join(os.Args[1:], " ")), "0"
	for ; ; time.Sleep(2 * time.Second) {
		answer := ask("GET", "/commands/"+command+"/events", nil, after)
		if answer == nil {
			continue
		}
		fields := map[string]string{}
		lines := bufio.NewReader(answer.Body)
		for line, err := lines.ReadString('\n'); err == nil; line, err = lines.ReadString('\n') {
			if name, value, found := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); found {
				fields[name] = value
				continue
			}
			if id, found := fields["id"]; found {
				after = id
			}
			var data event
			_ = json.Unmarshal([]byte(fields["data"]), &data)
			switch fields["event"] {
			case "output":
				out := map[string]*os.File{"stdout": os.Stdout, "stderr": os.Stderr}[data.Stream]
				fmt.Fprint(out, data.Line)
				if !data.Partial {
					fmt.Fprintln(out)
				}
			case "complete":
				if data.ExitCode == nil {
					os.Exit(1)
				}
				os.Exit(*data.ExitCode)
			}
			fields = map[string]string{}
		}
		answer.Body.Close()
	}
}
