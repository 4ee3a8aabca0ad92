// SPDX-License-Identifier: Apache-2.0

package onboard_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/agent/onboard"
)

const good = `{"v":1,"name":"web-1","namespace":"legacy","serviceAccount":"web","network":"n1","server":"meshd.example:15012","ports":[{"port":8080}]}`

func TestParseNamesWhatIsWrong(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, change, to, want string }{
		{"no name", `"web-1"`, `""`, "name is empty"},
		{"no network", `"n1"`, `""`, "network is empty"},
		{"server without port", `meshd.example:15012`, `meshd.example`, "want host:port"},
		{"newer schema", `"v":1`, `"v":2`, "schema version 2"},
		{"port zero", `8080`, `0`, "number 0"},
		{"not a range", `"ports"`, `"captureTo":["10/8"],"ports"`, `"10/8"`},
		{"not JSON", `{`, ``, "invalid"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := onboard.Parse([]byte(strings.Replace(good, c.change, c.to, 1)))
			if !errors.Is(err, onboard.ErrInvalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want it to say %q", err, c.want)
			}
		})
	}
}

func TestParseIgnoresWhatIsNewer(t *testing.T) {
	t.Parallel()
	config, err := onboard.Parse([]byte(strings.Replace(good, `{`, `{"later":7,`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	capture, err := config.Capture()
	if err != nil || len(capture) != 2 || capture[0].String() != "240.240.0.0/12" {
		t.Errorf("captures %v, %v; want the virtual ranges", capture, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Fuzz(func(t *testing.T, data []byte) {
		config, err := onboard.Parse(data)
		if err != nil {
			return
		}
		again, err := json.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := onboard.Parse(again); err != nil {
			t.Fatalf("refuses what it accepted: %v", err)
		}
	})
}
